"""Requests over time: the classes of digits forgotten one after another, against one joint request for the same.

The demo's ViT and its posterior, by the defaults. After each request: accuracy on the test images of the classes that
are left (D_r), on those of each class forgotten so far (D_f), and the KL from the posterior of preparation. The last
class cannot go: the model would have nothing to answer.

``python -m benchmarks.sequence OUT`` writes ``sequence.json``, ``sequence.md`` and ``sequence.png``.
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from distruction import ForgetReport, forget, models, prepare
from distruction.data import forget_split, load, loader
from distruction.experiments.demo import MODEL
from distruction.metrics import accuracy, predict
from distruction.report import write_json
from distruction.training import train


def measured(model: nn.Module, gone: list[str], report: ForgetReport) -> dict[str, Any]:
    """Accuracies on the classes that are left and on each that is gone, and what the request cost."""
    _, test_data = load("digits")
    _, left = forget_split(test_data, gone)
    parts = {c: forget_split(test_data, c)[0] for c in gone}
    return {
        "retain": accuracy(*predict(model, loader(left, batch_size=512))),
        "forget": {c: accuracy(*predict(model, loader(part, batch_size=512))) for c, part in parts.items()},
        "kl": report.kl,
        "steps": len(report.history),
        "seconds": report.seconds,
        "reached": report.reached,
    }


def run(seed: int, order: str) -> dict[str, Any]:
    """All requests of one seed."""
    train_data, test_data = load("digits")
    torch.manual_seed(seed)
    base = models.create(**MODEL)
    train(base, train_data, seed=seed, progress=False)
    posterior = prepare(base, loader(train_data, batch_size=64, shuffle=True), seed=seed, progress=False)
    options: dict[str, Any] = {"request": "class", "seed": seed, "progress": False}
    found: dict[str, Any] = {"seed": seed, "order": order, "before": [], "sequence": [], "joint": []}
    model = copy.deepcopy(base)
    previous = None
    for i in range(1, len(order)):
        gone = list(order[:i])
        _, left = forget_split(test_data, gone)
        found["before"].append(accuracy(*predict(base, loader(left, batch_size=512))))
        now, _ = forget_split(train_data, gone[-1])
        previous = forget(model, posterior, loader(now, batch_size=64, shuffle=True), previous=previous, **options)
        found["sequence"].append(measured(model, gone, previous))
        together, _ = forget_split(train_data, gone)
        joint = copy.deepcopy(base)
        report = forget(joint, posterior, loader(together, batch_size=64, shuffle=True), **options)
        found["joint"].append(measured(joint, gone, report))
        print(i, found["sequence"][-1]["retain"], found["joint"][-1]["retain"], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each number of classes gone."""
    lines = [
        "| classes gone | D_r before | one after another: D_r | worst D_f | KL | steps | reached "
        "| together: D_r | worst D_f | KL | steps | reached |",
        "|---|" + "---:|" * 11,
    ]
    for i, before in enumerate(found["before"]):
        cells = [f"{before:.1f}"]
        for how in ("sequence", "joint"):
            row = found[how][i]
            cells += [f"{row['retain']:.1f}", f"{max(row['forget'].values()):.1f}", f"{row['kl']:.0f}"]
            cells += [str(row["steps"]), "yes" if row["reached"] else "no"]
        lines.append(f"| {', '.join(found['order'][: i + 1])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(found: dict[str, Any], path: Path) -> None:
    """D_r and the D_f of each class against the number of requests."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    xs = range(1, len(found["before"]) + 1)
    left.plot(xs, found["before"], "x-", label="before")
    left.plot(xs, [r["retain"] for r in found["sequence"]], "o-", label="one after another")
    left.plot(xs, [r["retain"] for r in found["joint"]], "s-", label="together")
    left.set(xlabel="classes gone", ylabel="D_r, %", ylim=(left.get_ylim()[0], 100.5))
    left.legend()
    for i, c in enumerate(found["order"][:-1]):
        values = [r["forget"][c] for r in found["sequence"][i:]]
        right.plot(list(xs)[i:], values, "o-", alpha=0.6, label=c)
    right.set(xlabel="requests done", ylabel="D_f of each class gone, %", ylim=(-3, 103))
    right.legend(fontsize=7, ncols=3)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    seed: Annotated[int, typer.Option()] = 0,
    order: Annotated[str, typer.Option(help="The digits as they go; the last stays.")] = "0123456789",
) -> None:
    """Run it and write the table and the figure."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    found = run(seed, order)
    write_json(out / "sequence.json", found)
    (out / "sequence.md").write_text(table(found))
    figure(found, out / "sequence.png")
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
