"""The report folder of a bench: one HTML page, tables, figures and the numbers behind them."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import pages
from ..extras import needed
from ..methods import REGISTRY
from ..metrics import wilson_interval
from ..report import folder, write_json
from . import figures, tables
from .grid import Grid
from .jobs import Job, sweep_cells
from .materials import Context, make_split
from .results import COLUMNS, Cell, Contest, Table, collect, contest, described, summarise
from .results import tables as summaries_of
from .runner import Outcome
from .store import Facts, Store

with needed("experiments"):
    from matplotlib.figure import Figure

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
        mine = [c for c in found if c.scenario == scenario]
        forms = tables.forms(scenario, table)
        for name, (title, rows) in forms.items():
            (out / f"{scenario}-{name}.md").write_text(tables.markdown(rows))
            (out / f"{scenario}-{name}.tex").write_text(tables.latex(rows, f"{grid.title}, {scenario}: {title}."))
        sections.append(
            {
                "id": scenario,
                "heading": heading,
                "note": note,
                "sizes": _sizes(mine),
                "contest": _contest(contest(mine, table), table) if scenario != "random" else "",
                "tables": [{"heading": title, "rows": rows} for title, rows in forms.values()],
                "figures": _figures(out, grid, context, scenario, mine),
            }
        )
    (out / "summary.csv").write_text(tables.comma_separated(by_scenario))
    write_json(out / "results.json", described(found))
    write_json(out / "failures.json", {title: message for title, message in outcome.failures.values()})
    shown = {metric for table in by_scenario.values() for row in table.values() for metric in row}
    page = pages.render(
        "bench.html",
        title=grid.title,
        finished=len(found),
        total=len(jobs),
        failures=[(title, message.splitlines()[-1]) for title, message in outcome.failures.values()],
        sections=sections,
        columns=[column for metric, column in COLUMNS.items() if metric in shown],
        methods=[_described(grid, name) for name in grid.methods],
        provenance=_provenance(grid, context, found, command),
    )
    (out / "index.html").write_text(page)


def _sizes(found: Sequence[Cell]) -> str:
    """How many images an accuracy stands on, and what that alone leaves open."""
    counts = next(c.value["counts"] for c in found)
    interval = "{:.1f} to {:.1f} %".format(*wilson_interval(0.0, counts["forget"]))
    return (
        f"D_r is measured on {counts['retain']:,} images, D_f on {counts['forget']:,}, so that a single D_f of 0 % has "
        f"the 95 % interval {interval} (Wilson)."
    )


def _contest(found: Contest | None, table: Table) -> str:
    """One sentence on DiStruction against the best method that reads retain data."""
    if found is None:
        return ""
    own = table["distruction"]
    text = (
        f"DiStruction, which reads no retained example: D_r {tables.entry(own['retain'], 1)} % at D_f "
        f"{tables.entry(own['forget'], 1)} %{'' if found.forgets else ' (over 5 %)'}. "
    )
    if found.rival is None:
        return text + "No method that reads retained examples comes to D_f ≤ 5 %."
    rival = table[found.rival]
    text += (
        f"The best of those that read some and come to D_f ≤ 5 %, {tables.title(found.rival)}: "
        f"D_r {tables.entry(rival['retain'], 1)} % at D_f {tables.entry(rival['forget'], 1)} %."
    )
    if found.difference is None:
        return text
    return text + f" Difference in D_r, paired by seed and forget set: {tables.entry(found.difference, 1)} points."


def _figures(out: Path, grid: Grid, context: Context, scenario: str, found: list[Cell]) -> list[dict[str, Any]]:
    full = [c for c in found if not c.brief]
    drawn: list[tuple[str, Figure | None, str]] = []
    if grid.sweep is not None and grid.sweep.scenario == scenario:
        wanted = {job.id for job in sweep_cells(grid, context)}
        swept = [c for c in found if Job("cell", c.facts).id in wanted]
        first = [c for c in swept if c.seed == grid.sweep.seeds[0]]
        drawn.append(
            (
                "kl",
                figures.kl_curves(first),
                "KL(q ‖ p) against unlearning iterations, one curve per λ (the paper's Figure 1), and the accuracy of "
                "sampled weights on the batch to forget. One seed.",
            )
        )
        single = [c for c in full if c.target == grid.sweep.target and c.seed in grid.sweep.seeds]
        drawn.append(
            (
                "trade-off",
                figures.trade_off(swept, single),
                "D_r against D_f, a curve per method over the hyper-parameter in brackets; on the right the region of "
                "little D_f and at most 15 points below the best D_r, with λ at DiStruction's points. Up is better.",
            )
        )
    if full and full[0].target:
        split = make_split(full[0].facts["model"], full[0].facts["split"], context)
        target = [c for c in full if c.target == full[0].target]
        caption = f"What the forgotten class {full[0].target} is taken for, in percent, all seeds together."
        drawn.append(("confusion", figures.confusion(target, split.test.classes), caption))
    shown = next((c for c in full if c.method == "distruction"), None)
    if shown is not None:
        split = make_split(shown.facts["model"], shown.facts["split"], context)
        caption = "Predictions before → after unlearning with DiStruction, red where they changed. The first images."
        drawn.append(("examples", figures.predictions(shown, split), caption))
    pictures = []
    for name, figure, caption in drawn:
        if figure is not None:
            picture = pages.png(figure)
            (out / f"{scenario}-{name}.png").write_bytes(picture)
            image = pages.embedded(picture, caption, round(pages.SCREEN_DPI * figure.get_figwidth()))
            pictures.append({"picture": image, "caption": caption})
    return pictures


def _described(grid: Grid, name: str) -> dict[str, str]:
    method = REGISTRY[name]
    return {
        "name": tables.title(name),
        "summary": method.summary,
        "reads": method.reads,
        "settings": _settings(grid, name),
        "paper": method.paper,
    }


def _settings(grid: Grid, name: str) -> str:
    """The settings that differ from the defaults, by scenario where they differ between scenarios."""
    by_scenario = {
        s.name: ", ".join(f"{k} = {v}" for k, v in grid.settings_of(name, s.name).items()) or "defaults"
        for s in grid.scenarios
        if s.name in REGISTRY[name].scenarios
    }
    if len(set(by_scenario.values())) == 1:
        return next(iter(by_scenario.values()))
    return "; ".join(f"{scenario}: {text}" for scenario, text in by_scenario.items())


def _provenance(grid: Grid, context: Context, found: Sequence[Cell], command: str) -> str:
    lines = [
        f"command: {command}",
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {platform.machine()}",
        f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
        f"seeds: {list(grid.seeds)}",
        f"network: {json.dumps(dict(grid.network))}",
        f"training: {json.dumps(dict(grid.train))}",
        f"preparation: {json.dumps(dict(grid.prepare))}",
        f"measurements: {json.dumps(dict(grid.measure))}",
    ]
    lines += [f"seconds of {what}: {text}" for what, text in _preparation(context, found).items()]
    hashes = {c.facts["model"]["data"]["name"]: c.facts["model"]["data"]["sha256"] for c in found}
    lines += [f"data {name}: sha256 {value}" for name, value in hashes.items()]
    return "\n".join(lines)


def _preparation(context: Context, found: Sequence[Cell]) -> dict[str, str]:
    """Seconds of what comes before unlearning and is timed apart."""
    store = Store(context.store)
    names = {"model": "training", "retrained": "retraining", "posterior": "preparing a posterior"}
    out = {}
    for kind, name in names.items():
        facts = {job.id: job.facts for c in found for job in Job("cell", c.facts).needs() if job.kind == kind}
        done = [(value["seconds"], _seed_of(f)) for f in facts.values() if (value := store.load(kind, f)) is not None]
        if done:
            out[name] = (
                f"{tables.entry(summarise([s for s, _ in done], [seed for _, seed in done]), 1)} (n = {len(done)})"
            )
    return out


def _seed_of(facts: Facts) -> int:
    seed: int = facts.get("model", facts)["seed"]
    return seed
