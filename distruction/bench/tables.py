"""Tables as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Callable

from . import published
from .results import COLUMNS, Summary, Table, best, published_value

PAPER = ("retain", "forget", "mia_entropy")
"""The metrics of the paper's Tables 1 to 3."""

Mark = Callable[[str], str]


def number(value: float, digits: int) -> str:
    """A number, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def entry(summary: Summary, digits: int) -> str:
    """mean ± half width of the 95 % interval."""
    text = number(summary.mean, digits)
    return text if math.isnan(summary.half_width) else f"{text} ± {number(summary.half_width, digits)}"


def published_entry(value: published.Value | None) -> str:
    """mean ± standard deviation, as printed in the paper."""
    if value is None:
        return ""
    mean, std = value
    return f"{mean:g}" if std is None else f"{mean:.2f} ± {std:.2f}"


def paper_shape(scenario: str, table: Table, bold: Mark) -> list[list[str]]:
    """Rows of the paper's table: a head, then for each metric our row and the published one."""
    methods = list(table)
    rows = [["", *methods]]
    for metric in PAPER:
        column, winners = COLUMNS[metric], best(table, metric)
        cells = {m: entry(row[metric], column.digits) for m, row in table.items() if metric in row}
        rows.append([column.heading, *(bold(cells[m]) if m in winners else cells.get(m, "") for m in methods)])
        paper = [published_entry(published_value(scenario, metric, m)) for m in methods]
        rows.append([f"published ({published.DATA[scenario]})", *paper])
    return rows


def all_metrics(table: Table, bold: Mark) -> list[list[str]]:
    """One row per method, one column per metric."""
    metrics = [m for m in COLUMNS if any(m in row for row in table.values())]
    winners = {m: best(table, m) for m in metrics}
    rows = [["method", *(COLUMNS[m].heading for m in metrics)]]
    for method, row in table.items():
        cells = {m: entry(row[m], COLUMNS[m].digits) for m in metrics if m in row}
        rows.append([method, *(bold(cells[m]) if method in winners[m] else cells.get(m, "") for m in metrics)])
    return rows


def gaps(table: Table, bold: Mark) -> list[list[str]]:
    """One row per method: mean absolute difference to retraining in each metric where it means something."""
    metrics = [m for m in COLUMNS if any(m in row and not math.isnan(row[m].gap) for row in table.values())]
    rows = [["method", *(COLUMNS[m].heading for m in metrics)]]
    candidates = [m for m in table if m not in ("baseline", "retrain")]
    least = {
        m: min((round(table[c][m].gap, COLUMNS[m].digits) for c in candidates if m in table[c]), default=math.nan)
        for m in metrics
    }
    for method, row in table.items():
        if method == "retrain":
            continue
        line = [method]
        for metric in metrics:
            if metric not in row:
                line.append("")
                continue
            digits = COLUMNS[metric].digits
            text = number(row[metric].gap, digits)
            wins = method in candidates and round(row[metric].gap, digits) == least[metric]
            line.append(bold(text) if wins else text)
        rows.append(line)
    return rows


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
    for plain, tex in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("–", "--"), ("|", r"$|$")):
        text = text.replace(plain, tex)
    return text


def comma_separated(tables: dict[str, Table]) -> str:
    """Every summary in long form, full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["scenario", "method", "metric", "mean", "std", "half_width_95", "n", "gap", "published_mean", "published_std"]
    )
    for scenario, table in tables.items():
        for method, row in table.items():
            for metric, s in row.items():
                paper = published_value(scenario, metric, method) or (None, None)
                figures = [None if math.isnan(v) else v for v in (s.mean, s.std, s.half_width, s.n, s.gap)]
                writer.writerow([scenario, method, metric, *figures, *paper])
    return out.getvalue()


def bold_markdown(text: str) -> str:
    """Bold in Markdown, which `latex` understands too."""
    return f"**{text}**"
