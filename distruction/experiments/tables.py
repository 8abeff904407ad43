"""Tables as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence

from . import published
from .results import COLUMNS, GROUPS, SHOWN, Summary, Table, best, published_value

PAPER = {"retain": "retain_batch_mean", "forget": "forget_batch_mean", "mia_entropy": ""}
"""The metrics of the paper's Tables 1 to 3, and the form in which they are published where it differs."""

NAMES = {
    "unsir": "UNSIR",
    "ssd": "SSD",
    "ssd-per-sample": "SSD per sample",
    "scrub": "SCRUB",
    "delete": "DELETE",
    "distruction": "DiStruction",
    "distruction-auto": "DiStruction, Gauss-Newton",
    "distruction-depth": "DiStruction, Gauss-Newton, depth",
    "distruction-constant": "constant std",
    "distruction-fisher": "Fisher std",
}

Mark = Callable[[str], str]


def title(method: str) -> str:
    """A method's name as the papers write it."""
    stem = method.removesuffix("+kl")
    return NAMES.get(stem, stem) + (" + KL" if stem != method else "")


def number(value: float, digits: int) -> str:
    """A number, or a dash for NaN; never a negative zero."""
    if math.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def entry(summary: Summary, digits: int) -> str:
    """The mean, and what is known of its spread.

    Up to three seeds: (their values), or where these are lost (s and their standard deviation); more: ± half width of
    the 95 % interval of the mean; one accuracy: [Wilson's interval]; a count that is steady: nothing.
    """
    text = number(summary.mean, digits)
    if summary.n == 1:
        if math.isnan(summary.low):
            return text
        return f"{text} [{number(summary.low, digits)}, {number(summary.high, digits)}]"
    if digits == 0 and summary.high - summary.low < 1:
        return text
    if summary.n > SHOWN:
        return f"{text} ± {number((summary.high - summary.low) / 2, digits)}"
    if not summary.values:
        return f"{text} (s {number(summary.std, digits)})"
    return f"{text} ({', '.join(number(value, digits) for value in summary.values)})"


def published_entry(value: published.Value | None) -> str:
    """mean ± standard deviation, as printed in the paper."""
    if value is None:
        return ""
    mean, std = value
    return f"{mean:g}" if std is None else f"{mean:.2f} ± {std:.2f}"


def paper_shape(scenario: str, table: Table, bold: Mark) -> list[list[str]]:
    """The paper's table, its methods as columns.

    For each metric: our row, the same averaged over batches as published where that differs, and the published row.
    """
    mine = {m: row for m, row in table.items() if published_value(scenario, "retain", m) is not None}
    rows = [["", *map(title, mine)]]
    for metric, as_published in PAPER.items():
        for name in filter(None, (metric, as_published)):
            rows.append([COLUMNS[name].heading, *_line(mine, name, bold)])
        paper = [published_entry(published_value(scenario, metric, m)) for m in mine]
        rows.append([f"published ({published.DATA[scenario]})", *paper])
    return rows


def by_metric(table: Table, names: Sequence[str]) -> list[list[str]]:
    """One row per metric, one column per method: narrow."""
    rows = [[COLUMNS[m].heading, *_line(table, m, str)] for m in names]
    return [["", *map(title, table)], *rows]


def metrics(table: Table, group: str, bold: Mark) -> list[list[str]]:
    """One row per method, one column per metric of a group."""
    names = [m for m, c in COLUMNS.items() if c.group == group and any(m in row for row in table.values())]
    return _by_method(table, [COLUMNS[m].heading for m in names], [_line(table, m, bold) for m in names])


def gaps(table: Table, bold: Mark) -> list[list[str]]:
    """One row per method: mean absolute difference to retraining in each metric where it means something."""
    names = [
        m
        for m, c in COLUMNS.items()
        if c.group in GROUPS and any(m in row and not math.isnan(row[m].gap) for row in table.values())
    ]
    others = {method: row for method, row in table.items() if method != "retrain"}
    columns = []
    for name in names:
        winners, digits = best(others, name, by_gap=True), COLUMNS[name].digits
        texts = {m: number(row[name].gap, digits) for m, row in others.items() if name in row}
        columns.append([bold(texts[m]) if m in winners else texts.get(m, "") for m in others])
    return _by_method(others, [COLUMNS[m].heading for m in names], columns)


def _line(table: Table, metric: str, bold: Mark) -> list[str]:
    """A metric of every method, the best one bold."""
    winners, digits = best(table, metric), COLUMNS[metric].digits
    texts = {m: entry(row[metric], digits) for m, row in table.items() if metric in row}
    return [bold(texts[m]) if m in winners else texts.get(m, "") for m in table]


def _by_method(table: Table, headings: Sequence[str], columns: Sequence[Sequence[str]]) -> list[list[str]]:
    return [["method", *headings], *([title(m), *line] for m, *line in zip(table, *columns, strict=True))]


def markdown(rows: list[list[str]]) -> str:
    """A GitHub-flavoured table."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def latex(rows: list[list[str]], caption: str) -> str:
    """A booktabs table."""

    def line(row: list[str]) -> str:
        return " & ".join(_tex(cell) for cell in row) + r" \\"

    head, *body = rows
    columns = "l" + "r" * (len(head) - 1)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        line(head),
        r"\midrule",
        *(line(row) for row in body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    if text.startswith("**") and text.endswith("**"):
        return rf"\textbf{{{_tex(text[2:-2])}}}"
    for plain, tex in (
        ("%", r"\%"),
        ("&", r"\&"),
        ("_", r"\_"),
        (r"D\_r", r"$\mathcal{D}_r$"),
        (r"D\_f", r"$\mathcal{D}_f$"),
        ("±", r"$\pm$"),
        ("−", "$-$"),
        ("–", "--"),
    ):
        text = text.replace(plain, tex)
    return text


FIGURES = ("mean", "std", "low_95", "high_95", "n", "gap")
"""The columns of `comma_separated` that are numbers of a `Summary`, in its order."""


def comma_separated(tables: dict[str, Table]) -> str:
    """Every summary in long form, full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["scenario", "method", "metric", *FIGURES, "published_mean", "published_std", "seeds"])
    for scenario, table in tables.items():
        for method, row in table.items():
            for metric, s in row.items():
                paper = published_value(scenario, metric, method) or (None, None)
                ours = [None if math.isnan(v) else v for v in (s.mean, s.std, s.low, s.high, s.n, s.gap)]
                writer.writerow([scenario, method, metric, *ours, *paper, " ".join(map(repr, s.values))])
    return out.getvalue()


def read(text: str) -> dict[str, Table]:
    """The summaries that `comma_separated` wrote; older files have no column of the seeds' values."""
    found: dict[str, Table] = {}
    for line in csv.DictReader(io.StringIO(text)):
        mean, std, low, high, n, gap = (float(line[name] or "nan") for name in FIGURES)
        values = tuple(map(float, (line.get("seeds") or "").split()))
        row = found.setdefault(line["scenario"], {}).setdefault(line["method"], {})
        row[line["metric"]] = Summary(mean, std, low, high, int(n), gap, values)
    return found


def forms(scenario: str, table: Table) -> dict[str, tuple[str, list[list[str]]]]:
    """Every table of a scenario, best entries bold, by the stem of its file: its title and its rows."""
    bold = bold_markdown
    found = {"paper": ("In the shape of the paper's table", paper_shape(scenario, table, bold))}
    measured = {COLUMNS[m].group for row in table.values() for m in row if m in COLUMNS}
    found |= {group: (title, metrics(table, group, bold)) for group, title in GROUPS.items() if group in measured}
    if "retrain" in table:
        found["gaps"] = ("Mean absolute gap to retraining", gaps(table, bold))
    return found


def bold_markdown(text: str) -> str:
    """Bold in Markdown, which `latex` understands too."""
    return f"**{text}**"
