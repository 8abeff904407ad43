"""What a compressed prior costs in D_r and D_f, on the digits at the demo's settings.

    python -m benchmarks.compression

Each class is forgotten with the same posterior kept in several ways; all else, seeds included, is the same. Writes
``compression.json``.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from distruction import forget, metrics, models, prepare, report, scenarios
from distruction.data import load, loader
from distruction.experiments.demo import MODEL
from distruction.training import train

from . import harness

RESULTS = Path(__file__).with_name("results") / "memory"
KEPT: dict[str, dict[str, str]] = {
    "float32": {"std": "float32"},
    "std log8": {"std": "log8"},
    "std bfloat16": {"std": "bfloat16"},
    "std log8, mean bfloat16": {"std": "log8", "mean": "bfloat16"},
}


def _accuracies(model: nn.Module, split: scenarios.Split) -> dict[str, float]:
    parts = {"retain": split.measured_retain, "forget": split.measured_forget, "forget_train": split.forget}
    return {n: metrics.accuracy(*metrics.predict(model, loader(data, batch_size=512))) for n, data in parts.items()}


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
    forget_class: Annotated[list[str], typer.Option("--class", help="Digit to forget; repeatable.")] = ["0", "3", "8"],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Of training.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Of preparation.")] = 1000,
) -> None:
    """Forget digits with the posterior kept in each way."""
    train_data, test_data = load("digits")
    torch.manual_seed(seed)
    model = models.create(**MODEL)
    train(model, train_data, epochs=epochs, seed=seed, progress=False)
    posterior = prepare(model, loader(train_data, batch_size=64, shuffle=True), steps=steps, seed=seed, progress=False)
    rows: list[dict[str, Any]] = []
    for name in forget_class:
        split = scenarios.full_class(train_data, test_data, name)
        rows.append({"class": name, "prior": "(before)", **_accuracies(model, split)})
        for title, storage in KEPT.items():
            prior = posterior.compress(**storage)
            posterior.mean_(model)
            result = forget(model, prior, loader(split.forget, batch_size=64, shuffle=True), seed=seed, progress=False)
            errors = torch.cat(
                [((prior.stds[n] - posterior.stds[n]).abs() / posterior.stds[n]).flatten() for n in posterior]
            )
            rows.append(
                {
                    "class": name,
                    "prior": title,
                    "bytes_per_parameter": round(prior.nbytes / prior.numel(), 3),
                    "largest_std_error_percent": round(100 * errors.max().item(), 3),
                    **_accuracies(model, split),
                    "kl": result.history[-1].kl,
                }
            )
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        posterior.mean_(model)
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.compression", *sys.argv[1:]])
    report.write_json(
        out / "compression.json", {"command": command, **harness.environment(torch.device("cpu")), "rows": rows}
    )


if __name__ == "__main__":
    typer.run(main)
