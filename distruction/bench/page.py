"""The report folder of a bench: one HTML page, tables, figures and the numbers behind them."""

import base64
import html
import io
import json
import platform
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from ..methods import REGISTRY
from ..report import folder, write_json
from . import figures, tables
from .grid import Grid
from .jobs import Context, Job, make_split, sweep_cells
from .results import COLUMNS, Cell, collect
from .results import tables as summaries_of
from .runner import Outcome
from .store import Store

HEADINGS = {
    "full-class": ("Full class (the paper's Table 1)", "One class is forgotten; D_f is measured on its test images."),
    "sub-class": (
        "Sub-class (the paper's Table 2)",
        "The head knows super classes; one fine class is forgotten. Retraining still recognises part of it by its "
        "siblings, so D_f of retrain is not zero.",
    ),
    "random": (
        "Random examples (the paper's Table 3)",
        "Random training examples are forgotten; D_f is measured on these examples, D_r on the whole test set. "
        "Retraining classifies most of them rightly, as it does unseen images.",
    ),
}


def write(out: Path, grid: Grid, context: Context, cells: Sequence[Job], outcome: Outcome, command: str) -> list[Cell]:
    """Write ``out`` (index.html, tables, figures, results.json) whole or not at all; returns the finished cells."""
    found = collect(cells, Store(context.store))
    with folder(out, overwrite=True) as draft:
        _write(draft, grid, context, cells, found, outcome, command)
    return found


def _write(
    out: Path,
    grid: Grid,
    context: Context,
    jobs: Sequence[Job],
    found: list[Cell],
    outcome: Outcome,
    command: str,
) -> None:
    by_scenario = summaries_of(found)
    sections = []
    for scenario, table in by_scenario.items():
        heading, note = HEADINGS[scenario]
        forms = {
            "paper": ("In the shape of the paper's table", tables.paper_shape(scenario, table, tables.bold_markdown)),
            "metrics": ("All metrics", tables.all_metrics(table, tables.bold_markdown)),
            "gaps": ("Mean absolute gap to retraining", tables.gaps(table, tables.bold_markdown)),
        }
        for name, (title, rows) in forms.items():
            (out / f"{scenario}-{name}.md").write_text(tables.markdown(rows))
            (out / f"{scenario}-{name}.tex").write_text(tables.latex(rows, f"{grid.title}, {scenario}: {title}."))
        pictures = _figures(out, grid, context, scenario, [c for c in found if c.scenario == scenario])
        parts = [
            {"heading": title, "rows": [[_bold_html(cell) for cell in row] for row in rows]}
            for title, rows in forms.values()
        ]
        sections.append({"heading": heading, "note": note, "tables": parts, "figures": pictures})
    (out / "summary.csv").write_text(tables.comma_separated(by_scenario))
    write_json(out / "results.json", _numbers(found))
    write_json(out / "failures.json", {title: message for title, message in outcome.failures.values()})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((resources.files(__package__) / "page.html").read_text())
    shown = {metric for table in by_scenario.values() for row in table.values() for metric in row}
    page = template.render(
        title=grid.title,
        finished=len(found),
        total=len(jobs),
        failures=[(title, message.splitlines()[-1]) for title, message in outcome.failures.values()],
        sections=sections,
        columns=[column for metric, column in COLUMNS.items() if metric in shown],
        methods=[{"name": name, **_described(name), "settings": _settings(grid, name)} for name in grid.methods],
        provenance=_provenance(grid, found, command),
    )
    (out / "index.html").write_text(page)


def _figures(out: Path, grid: Grid, context: Context, scenario: str, found: list[Cell]) -> list[dict[str, Any]]:
    full = [c for c in found if not c.brief]
    drawn: list[tuple[str, Figure | None, str]] = []
    if grid.sweep is not None and grid.sweep.scenario == scenario:
        wanted = {job.id for job in sweep_cells(grid, context)}
        swept = [c for c in found if Job("cell", c.facts).id in wanted]
        first = [c for c in swept if c.seed == grid.sweep.seeds[0]]
        drawn.append(
            ("kl", figures.kl_curves(first), "KL(q ‖ p) against unlearning iterations per λ (the paper's Figure 1).")
        )
        single = [c for c in full if c.target == grid.sweep.target and c.seed in grid.sweep.seeds]
        caption = "D_r against D_f, one curve per method over the hyper-parameter in brackets; up and left is better."
        drawn.append(("trade-off", figures.trade_off(swept, single), caption))
    if full:
        split = make_split(full[0].facts["model"], full[0].facts["split"], context)
        target = [c for c in full if c.target == full[0].target]
        caption = "Predicted classes on the measured forget set, in percent, all seeds together."
        drawn.append(("confusion", figures.confusion(target, split.test.classes), caption))
    shown = next((c for c in full if c.method == "distruction"), None)
    if shown is not None:
        split = make_split(shown.facts["model"], shown.facts["split"], context)
        caption = "Predictions before → after unlearning with DiStruction; one name where nothing changed."
        drawn.append(("examples", figures.examples(split, shown.value["examples"]), caption))
    pictures = []
    for name, figure, caption in drawn:
        if figure is not None:
            picture = io.BytesIO()
            figure.savefig(picture, dpi=130, format="png")
            (out / f"{scenario}-{name}.png").write_bytes(picture.getvalue())
            data = base64.b64encode(picture.getvalue()).decode()
            image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, data)
            pictures.append({"picture": image, "caption": caption})
    return pictures


def _bold_html(text: str) -> Markup:
    bold = text.startswith("**") and text.endswith("**") and len(text) > 4
    return Markup(f"<b>{html.escape(text[2:-2])}</b>" if bold else html.escape(text))


def _described(name: str) -> dict[str, str]:
    method = REGISTRY[name]
    return {"summary": method.summary, "reads": method.reads, "paper": method.paper}


def _settings(grid: Grid, name: str) -> str:
    given = grid.settings.get(name)
    return ", ".join(f"{k} = {v}" for k, v in given.items()) if given else "defaults"


def _numbers(found: Sequence[Cell]) -> list[dict[str, Any]]:
    return [
        {
            "scenario": c.scenario,
            "target": c.target,
            "method": c.method,
            "seed": c.seed,
            "settings": dict(c.settings),
            "brief": c.brief,
            **c.numbers,
        }
        for c in found
    ]


def _provenance(grid: Grid, found: Sequence[Cell], command: str) -> str:
    lines = [
        f"command: {command}",
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {platform.machine()}",
        f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
        f"seeds: {list(grid.seeds)}",
        f"network: {json.dumps(dict(grid.network))}",
        f"training: {json.dumps(dict(grid.train))}",
        f"preparation: {json.dumps(dict(grid.prepare))}",
    ]
    hashes = {c.facts["model"]["data"]["name"]: c.facts["model"]["data"]["sha256"] for c in found}
    lines += [f"data {name}: sha256 {value}" for name, value in hashes.items()]
    return "\n".join(lines)
