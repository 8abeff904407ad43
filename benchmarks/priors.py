"""What the learned std is worth: priors compared over classes, seeds, objectives and widths, each with its own lambda.

A ViT is trained on scikit-learn's digits or on Fashion-MNIST, its posterior is prepared in several ways, and each class
is forgotten from each of them. lambda is found by the same rule for every prior (`distruction.strength`), and nothing
else is tuned.

- ``gauss-newton``: `distruction.prepare` as it is;
- ``bgd``: its ``method="bgd"``, the paper's;
- ``bgd, pooled per row`` and ``bgd, pooled per tensor``: its precisions averaged over each output's weights, and over
  each tensor, which takes their noise out and most of their knowledge;
- ``constant, mean precision`` and ``constant, geometric mean``: one std, from the first's;
- ``constant per tensor``: one std per tensor, of the tensor's mean precision;
- ``fisher``: 1/std**2 = 1/std_init**2 + evidence * diagonal empirical Fisher at the means;
- for the narrowest model ``gauss-newton`` and ``bgd`` of fewer steps as well.

And how much of a Gauss-Newton std is noise, by the number of steps: between two preparations with different draws.

``python -m benchmarks.priors OUT`` writes ``SIZE-seed-N.json`` for each model, ``priors.md`` of all that are there and
two figures; a run that was stopped goes on with the priors that are missing. Fashion-MNIST's models are asked for with
``--size Fashion-MNIST --data ROOT``.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.trained import grid_of, trained
from distruction import Posterior, forget, prepare
from distruction.data import Images, forget_split, load, loader
from distruction.experiments.materials import Context
from distruction.methods.ablations import constant_std, fisher_std
from distruction.metrics import accuracy, predict
from distruction.report import write_json
from distruction.training import train

WIDTHS = {"0.2 M": (64, 4, 4), "2.7 M": (192, 6, 4), "10.7 M": (384, 6, 6)}
"""Of the digits' models: embedding dimension, blocks and heads by the number of parameters."""
FASHION = "Fashion-MNIST"
"""The model of the experiments on it (`benchmarks.trained`), right on 90 % of the test images."""
NARROWEST = next(iter(WIDTHS))
SHORTER = {
    "gauss-newton, 15 steps": ("gauss-newton", 15),
    "gauss-newton, 50 steps": ("gauss-newton", 50),
    "bgd, 150 steps": ("bgd", 150),
    "bgd, 500 steps": ("bgd", 500),
}
"""Preparations of fewer steps, of the narrowest model alone."""
OBJECTIVES = ("masked-teacher", "uniform-others")
STEPS = (30, 75, 150)
"""Of the preparations whose noise is measured."""
PRIORS = (
    "gauss-newton",
    "bgd",
    "bgd, pooled per row",
    "bgd, pooled per tensor",
    "constant, mean precision",
    "constant, geometric mean",
    "constant per tensor",
    "fisher",
    *SHORTER,
)


def network(size: str) -> nn.Module:
    """The ViT of `WIDTHS` for images of 8 x 8 pixels."""
    dim, depth, heads = WIDTHS[size]
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=dim, depth=depth, num_heads=heads
    )


def step_size(size: str) -> float:
    """Of training, in inverse proportion to the width: at 2e-3 the wider ViT does not learn its whole training set."""
    return 2e-3 * WIDTHS["0.2 M"][0] / WIDTHS[size][0]


@dataclass(frozen=True)
class Subject:
    """A trained model, its data, and how many examples its training read."""

    model: nn.Module
    train_data: Images
    test_data: Images
    read: int


def subject(size: str, seed: int, context: Context) -> Subject:
    """The model of `WIDTHS` or `FASHION`."""
    if size == FASHION:
        both = load("fashion-mnist", context.data_root)
        model = trained("fashion-mnist", seed, context)
        return Subject(model, *both, grid_of("fashion-mnist").train["epochs"] * len(both[0]))
    train_data, test_data = load("digits")
    torch.manual_seed(seed)
    model = network(size)
    train(model, train_data, lr=step_size(size), seed=seed, progress=False)
    return Subject(model, train_data, test_data, 40 * len(train_data))


def priors(
    model: nn.Module, data: Images, names: Sequence[str], *, seed: int, bgd_steps: int
) -> Iterator[tuple[str, Posterior, int, float]]:
    """Name, posterior, samples read and seconds of each prior of ``names``."""
    batches = loader(data, batch_size=64, shuffle=True)
    for name in [n for n in names if n in SHORTER]:
        method, steps = SHORTER[name]
        start = time.perf_counter()
        posterior = prepare(model, batches, method=method, steps=steps, seed=seed, progress=False)
        yield name, posterior, steps * 64 * (2 if method == "bgd" else 1), time.perf_counter() - start
    names = [n for n in names if n not in SHORTER]
    if wanted := [n for n in names if n.startswith("bgd")]:
        start = time.perf_counter()
        posterior = prepare(model, batches, method="bgd", steps=bgd_steps, seed=seed, progress=False)
        read, seconds = bgd_steps * 2 * 64, time.perf_counter() - start
        per_row, per_tensor = pooled(posterior, from_dim=1), pooled(posterior)
        found = {"bgd": posterior, "bgd, pooled per row": per_row, "bgd, pooled per tensor": per_tensor}
        yield from ((name, found[name], read, seconds) for name in wanted)
    if len(wanted) == len(names):
        return
    start = time.perf_counter()
    learned = prepare(model, batches, steps=150, seed=seed, progress=False)
    read, seconds = 150 * 64, time.perf_counter() - start
    logs = [s.double().log().sum().item() for s in learned.stds.values()]
    found = {
        "gauss-newton": learned,
        "constant, mean precision": constant_std(learned),
        "constant, geometric mean": Posterior.around(model, math.exp(sum(logs) / learned.numel())),
        "constant per tensor": pooled(learned),
    }
    for name, posterior in found.items():
        if name in names:
            yield name, posterior, read, seconds
    if "fisher" in names:
        start = time.perf_counter()
        yield "fisher", fisher_std(model, data, learned), len(data), time.perf_counter() - start


def pooled(posterior: Posterior, from_dim: int = 0) -> Posterior:
    """Precisions 1/std**2 averaged over a tensor's dimensions from ``from_dim`` on; what has none of them is kept."""

    def average(std: Tensor) -> Tensor:
        dims = tuple(range(from_dim, std.ndim))
        return std.double().pow(-2).mean(dims, keepdim=True).pow(-0.5).expand_as(std).to(std.dtype) if dims else std

    return Posterior(posterior.means, {n: average(s).clone() for n, s in posterior.stds.items()})


def noise(model: nn.Module, data: Images, steps: int, seed: int) -> float:
    """Relative noise of a Gauss-Newton std: RMS of the log-ratio of two independent preparations, over sqrt(2)."""
    batches = loader(data, batch_size=64, shuffle=True)
    one, other = (prepare(model, batches, steps=steps, seed=s, progress=False).stds for s in (1000 + seed, 2000 + seed))
    ratios = torch.cat([(one[n] / other[n]).log().flatten() for n in one])
    return (ratios.double().square().mean() / 2).sqrt().item()


def run(file: Path, size: str, seed: int, names: Sequence[str], bgd_steps: int, context: Context) -> None:
    """All objectives and classes for one model and the priors that ``file`` lacks; it is written after each of them."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"sampled": {}, "rows": []}
    names = [n for n in names if n not in found["sampled"] and (size == NARROWEST or n not in SHORTER)]
    if not names:
        return
    torch.set_num_threads(1)
    it = subject(size, seed, context)
    # Every prior has the same means, so the model before is the same for all.
    before = Predicted.of(it.model, it.test_data)
    found |= {
        "size": size,
        "parameters": sum(p.numel() for p in it.model.parameters()),
        "seed": seed,
        "training_read": it.read,
        "means": before.accuracy(),
    }
    for name, posterior, read, seconds in priors(it.model, it.train_data, names, seed=seed, bgd_steps=bgd_steps):
        common = {"prior": name, "preparation_read": read, "preparation_seconds": seconds}
        found["sampled"][name] = _sampled_accuracy(it.model, posterior, it.test_data)
        found["rows"] += [
            {**common, **_forgotten(it, posterior, before, objective, number)}
            for objective in OBJECTIVES
            for number in range(len(it.train_data.classes))
        ]
        posterior.mean_(it.model)
        write_json(file, found)
    if "noise" not in found:
        found["noise"] = {str(steps): noise(it.model, it.train_data, steps, seed) for steps in STEPS}
        write_json(file, found)


@dataclass(frozen=True)
class Predicted:
    """What a model says of the test set, and what is right."""

    logits: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: nn.Module, data: Images) -> "Predicted":
        """Of all of ``data``."""
        return cls(*predict(model, loader(data, batch_size=512)))

    def accuracy(self, where: Tensor | None = None) -> float:
        """Percent of the images, or of some, that it calls right."""
        rows = slice(None) if where is None else where
        return accuracy(self.logits[rows], self.labels[rows])


def _forgotten(it: Subject, posterior: Posterior, before: Predicted, objective: str, number: int) -> dict[str, Any]:
    """One class forgotten with one objective."""
    gone, _ = forget_split(it.train_data, it.train_data.classes[number])
    posterior.mean_(it.model)
    batches = loader(gone, batch_size=64, shuffle=True)
    report = forget(it.model, posterior, batches, request="class", objective=objective, progress=False)
    after = Predicted.of(it.model, it.test_data)
    forgotten = after.labels == number
    return {
        "objective": objective,
        "class": number,
        "baseline": before.accuracy(~forgotten),
        "retained": after.accuracy(~forgotten),
        "forgotten": after.accuracy(forgotten),
        "reached": report.reached,
        "steps": len(report.history),
        "kl": report.kl,
        "seconds": report.seconds,
    }


def _sampled_accuracy(model: nn.Module, posterior: Posterior, data: Images) -> float:
    """Percent of the test set that samples of the posterior call right, over ten samples."""
    copied = copy.deepcopy(model)
    right = 0
    for inputs, labels in loader(data, batch_size=2000):
        logits = posterior.predict(copied, inputs, samples=10, seed=1).logits
        right += (logits.argmax(dim=-1) == labels).sum().item()
    return 100.0 * right / (10 * len(data))


def results_in(out: Path) -> list[dict[str, Any]]:
    """The runs of a folder: the digits' by width, then the others, each by seed."""
    found = [json.loads(f.read_text()) for f in out.glob("*-seed-*.json")]
    return sorted(found, key=lambda r: (r["size"] == FASHION, r["parameters"], r["seed"]))


@dataclass(frozen=True)
class Change:
    """What forgetting did under one prior and objective, over the seeds of one model.

    Attributes:
        seeds: of each seed the mean change of D_r over the classes, in points.
        worst: of all of them.
        forgotten: mean D_f in percent.
        missed: runs that did not reach their level.
    """

    seeds: list[float]
    worst: float
    forgotten: float
    missed: int

    @classmethod
    def of(cls, runs: list[dict[str, Any]], prior: str, objective: str) -> "Change":
        """Of the runs of one model that have this prior."""
        by_seed = [[x for x in r["rows"] if (x["prior"], x["objective"]) == (prior, objective)] for r in runs]
        changes = [[x["retained"] - x["baseline"] for x in rows] for rows in by_seed]
        return cls(
            seeds=[statistics.fmean(c) for c in changes],
            worst=min(min(c) for c in changes),
            forgotten=statistics.fmean(x["forgotten"] for rows in by_seed for x in rows),
            missed=sum(not x["reached"] for rows in by_seed for x in rows),
        )


def by_prior(runs: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Model, prior, and the runs that have it: one that was stopped has some priors for some of the seeds."""
    for size in dict.fromkeys(r["size"] for r in runs):
        some = [r for r in runs if r["size"] == size]
        there = dict.fromkeys(p for r in some for p in r["sampled"])
        for prior in sorted(there, key=lambda p: PRIORS.index(p) if p in PRIORS else len(PRIORS)):
            yield size, prior, [r for r in some if prior in r["sampled"]]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the change of D_r against the model before, by prior: the mean of the seeds' means, and these."""
    lines = [
        "| model | prior | samples read | sampled acc. | change of D_r, masked-teacher | worst | D_f "
        "| change of D_r, uniform-others | worst | D_f | not reached |",
        "|---|---|---:|---:|---|---:|---:|---|---:|---:|---:|",
    ]
    for size, prior, some in by_prior(runs):
        found = [Change.of(some, prior, objective) for objective in OBJECTIVES]
        cells = []
        for c in found:
            values = ", ".join(f"{s:+.2f}" for s in c.seeds)
            cells += [f"{statistics.fmean(c.seeds):+.2f} ({values})", f"{c.worst:+.1f}", f"{c.forgotten:.1f}"]
        sampled = statistics.fmean(r["sampled"][prior] for r in some)
        missed = sum(c.missed for c in found)
        lines.append(
            f"| {size} | {prior} | {_samples_read(some, prior):,} | {sampled:.1f} | {' | '.join(cells)} | {missed} |"
        )
    for size in dict.fromkeys(r["size"] for r in runs):
        some = [r for r in runs if r["size"] == size]
        means = statistics.fmean(r["means"] for r in some)
        lines.append(f"| {size} | (the means) | {some[0]['training_read']:,} (training) | {means:.1f} |||||||")
    lines += ["", "| model | seed | steps | relative noise of std | times sqrt(steps) |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {r['size']} | {r['seed']} | {steps} | {value:.3f} | {value * int(steps) ** 0.5:.2f} |"
        for r in runs
        for steps, value in r.get("noise", {}).items()
    ]
    return "\n".join(lines) + "\n"


def overview(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean change of D_r and the worst, a row for each prior, as the page of results has it."""
    seeds = {
        size: len({r["seed"] for r in runs if r["size"] == size}) for size in dict.fromkeys(r["size"] for r in runs)
    }
    head = " | ".join(f"{size}: {objective}" for size in seeds for objective in OBJECTIVES)
    lines = [f"| prior | {head} |", "|---|" + "---:|" * (len(seeds) * len(OBJECTIVES))]
    there = [(size, prior, some) for size, prior, some in by_prior(runs) if prior not in SHORTER]
    for prior in dict.fromkeys(p for _, p, _ in there):
        mine = {size: some for size, p, some in there if p == prior}
        cells = []
        for size, count in seeds.items():
            for objective in OBJECTIVES if size in mine else ():
                c = Change.of(mine[size], prior, objective)
                some = f" [{len(c.seeds)} of {count}]" if len(c.seeds) < count else ""
                cells.append(f"{statistics.fmean(c.seeds):+.2f} ({c.worst:+.1f}){some}")
            cells += [] if size in mine else ["–"] * len(OBJECTIVES)
        lines.append(f"| {prior} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nSeeds: {', '.join(f'{size} {count}' for size, count in seeds.items())}.\n"


def _samples_read(runs: list[dict[str, Any]], prior: str) -> int:
    """Samples that the preparation of a prior read."""
    return next(int(x["preparation_read"]) for x in runs[0]["rows"] if x["prior"] == prior)


LABELS = {"parameters": "parameters", "preparation_read": "samples read by preparation"}
"""What the figures are against."""


def figure(runs: list[dict[str, Any]], path: Path, *, against: str) -> None:
    """The digits' mean change of D_r: of the narrowest model against samples read by preparation, or against the width.

    Changes of less than a point on a linear scale, larger ones on a logarithmic one.
    """
    import matplotlib.pyplot as plt

    runs = [r for r in runs if r["size"] != FASHION]
    if against != "parameters":
        runs = [r for r in runs if r["size"] == runs[0]["size"]]
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for ax, objective in zip(axes, OBJECTIVES, strict=True):
        points: dict[str, dict[float, list[float]]] = {}
        for _, prior, some in by_prior(runs):
            x = some[0]["parameters"] if against == "parameters" else _samples_read(some, prior)
            label = SHORTER[prior][0] if prior in SHORTER else prior
            if label == prior or against != "parameters":
                points.setdefault(label, {}).setdefault(x, []).extend(Change.of(some, prior, objective).seeds)
        for label, found in points.items():
            xs = sorted(found)
            ax.plot(xs, [statistics.fmean(found[x]) for x in xs], "o-", label=label, alpha=0.8)
        ax.set(xscale="log", title=objective, xlabel=LABELS[against])
        ax.set_yscale("symlog", linthresh=1.0)
        ax.axhline(0.0, color="0.7", linewidth=0.8)
    axes[0].set_ylabel("change of D_r in points")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    size: Annotated[list[str], typer.Option(help=f"Of {', '.join(WIDTHS)}, {FASHION}.")] = list(WIDTHS),  # noqa: B006
    seed: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
    prior: Annotated[list[str], typer.Option(help=f"Of {', '.join(PRIORS)}.")] = list(PRIORS),  # noqa: B006
    bgd_steps: Annotated[int, typer.Option(min=1, help="Updates of BGD, two samples each.")] = 1500,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: only the tables of what is there.")] = 2,
    data: Annotated[Path | None, typer.Option(help="Root of the data sets but digits.")] = None,
    store: Annotated[Path | None, typer.Option(help="Of the experiments: Fashion-MNIST's models.")] = None,
) -> None:
    """Run what is missing and write the tables."""
    out.mkdir(parents=True, exist_ok=True)
    context = Context(store or out / "store", data)
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(run, out / f"{s.replace(' ', '')}-seed-{n}.json", s, n, prior, bgd_steps, context)
                for s in size
                for n in seed
            ]
            for job in jobs:
                job.result()
    runs = results_in(out)
    (out / "priors.md").write_text(table(runs))
    figure(runs, out / "samples.png", against="preparation_read")
    figure(runs, out / "width.png", against="parameters")
    print(table(runs))


if __name__ == "__main__":
    typer.run(main)
