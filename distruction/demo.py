"""The main job on real data that needs no download: train, prepare, drop the data, forget, compare."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models, ops, report
from .data import Examples, Images, forget_split, load, loader
from .errors import UsageError
from .fisher import per_sample
from .forgetting import ForgetReport, forget
from .initial import initial_std
from .methods.base import Counted, Selected
from .metrics import accuracy, entropy_mia, predict
from .posterior import Posterior
from .preparation import prepare, total_evidence
from .training import train

EPOCHS = 40
MODEL: dict[str, Any] = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}

COLUMNS = {
    "retain_test": "D_r test %",
    "forget_test": "D_f test %",
    "forget_train": "D_f train %",
    "mia": "MIA %",
    "kl": "KL nats",
    "seconds": "seconds",
    "retain_read": "retain read",
}


@dataclass(frozen=True)
class Run:
    """One class forgotten with one seed: the metrics of `COLUMNS` by method."""

    forget_class: str
    seed: int
    rows: dict[str, dict[str, float]]

    @property
    def loss_of_retained(self) -> float:
        """Points of test accuracy on the retained classes that DiStruction lost against the baseline."""
        return self.rows["baseline"]["retain_test"] - self.rows["DiStruction"]["retain_test"]


def measure(
    model: nn.Module, train_data: Images, test_data: Images, forget_class: str | Sequence[str]
) -> dict[str, float]:
    """Accuracy on retained and forgotten classes, and the entropy membership inference, in percent."""
    forget_train, retain_train = forget_split(train_data, forget_class)
    forget_test, retain_test = forget_split(test_data, forget_class)
    logits: dict[str, tuple[Tensor, Tensor]] = {
        name: predict(model, loader(data, batch_size=512))
        for name, data in (
            ("forget_train", forget_train),
            ("retain_train", retain_train),
            ("forget_test", forget_test),
            ("retain_test", retain_test),
        )
    }
    test = torch.cat([logits["forget_test"][0], logits["retain_test"][0]])
    return {
        "retain_test": accuracy(*logits["retain_test"]),
        "forget_test": accuracy(*logits["forget_test"]),
        "forget_train": accuracy(*logits["forget_train"]),
        "mia": entropy_mia(logits["retain_train"][0], test, logits["forget_train"][0]),
    }


def constant_std(posterior: Posterior) -> Posterior:
    """The posterior with one std everywhere, of the same mean precision 1/std**2."""
    precision = sum(s.double().pow(-2).sum().item() for s in posterior.stds.values()) / posterior.numel()
    std = precision**-0.5
    return Posterior(posterior.means, {n: torch.full_like(s, std) for n, s in posterior.stds.items()})


def fisher_std(model: nn.Module, data: Images, posterior: Posterior) -> Posterior:
    """The posterior with 1/std**2 = 1/std_init**2 + evidence * diagonal empirical Fisher of ``data``.

    The Fisher is the mean of squared per-example gradients of the log-likelihood (Laplace's usual diagonal), at the
    posterior's means, which ``model`` holds afterwards.
    """
    posterior.mean_(model)
    fisher = per_sample(model, loader(data, batch_size=64))
    initial = initial_std(model)
    evidence = total_evidence(posterior.metadata)
    return Posterior(
        posterior.means,
        {n: (initial[n] ** -2 + evidence * f).rsqrt() for n, f in fisher.items()},
        posterior.metadata,
    )


def run_demo(
    out: Path,
    *,
    classes: Sequence[str],
    seeds: Sequence[int],
    overwrite: bool,
    ablations: bool,
    backend: str,
    progress: bool,
) -> list[Run]:
    """Run the demo for each seed and forgotten class, and write its report folder.

    Args:
        out: report folder; holds metrics.json and, for each run, a folder ``class-C-seed-S`` with curves.png,
            examples.png, posterior.safetensors and model.safetensors (the unlearned model).
        classes: digits to forget, one at a time.
        seeds: of everything that is drawn.
        overwrite: replace ``out`` where it exists.
        ablations: also forget with a constant std and with a diagonal Fisher std.
        backend: see `distruction.ops`.
        progress: show progress bars.
    """
    ops.resolve(backend, "cpu")
    train_data, test_data = load("digits")
    for name in classes:
        forget_split(train_data, name)
    for given in (classes, seeds):
        if len(set(given)) < len(given):
            raise UsageError(f"name each class and each seed once, not {', '.join(map(str, given))}")
    runs = []
    with report.folder(out, overwrite=overwrite) as draft:
        for seed in seeds:
            model, training_seconds = _trained(train_data, seed, progress)
            start = time.perf_counter()
            train_loader = loader(train_data, batch_size=64, shuffle=True)
            posterior = prepare(model, train_loader, seed=seed, backend=backend, progress=progress)
            preparation = {"seconds": time.perf_counter() - start}
            for name in classes:
                posterior.mean_(model)
                baseline = {**measure(model, train_data, test_data, name), "seconds": training_seconds}
                rows = {"baseline": baseline, "(preparation)": preparation}
                run = Run(name, seed, rows)
                folder = draft / f"class-{name}-seed-{seed}"
                folder.mkdir()
                _run_class(folder, run, model, posterior, train_data, test_data, ablations, backend, progress)
                runs.append(run)
        report.write_json(
            draft / "metrics.json",
            {
                "data": "digits",
                "model": MODEL["name"],
                "backend": backend,
                "torch": torch.__version__.split("+")[0],
                "runs": [
                    {"class": r.forget_class, "seed": r.seed, "metrics": {m: _finite(v) for m, v in r.rows.items()}}
                    for r in runs
                ],
            },
        )
    return runs


def phases(runs: Sequence[Run]) -> dict[str, float]:
    """Seconds of each phase over all runs, without the measurements; a seed's model is trained and prepared once."""
    first = list({run.seed: run for run in reversed(runs)}.values())
    found = {
        "train": sum(run.rows["baseline"]["seconds"] for run in first),
        "prepare, the training data still there": sum(run.rows["(preparation)"]["seconds"] for run in first),
        "forget, with the forget set alone": sum(run.rows["DiStruction"]["seconds"] for run in runs),
        "retrain, to compare with": sum(run.rows["retrain"]["seconds"] for run in runs),
    }
    ablations = [row["seconds"] for run in runs for name, row in run.rows.items() if name.endswith(" std")]
    return {**found, "ablations": sum(ablations)} if ablations else found


def summary(runs: Sequence[Run]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation (n - 1) over the runs of each metric by method."""
    return {
        method: {
            key: (statistics.fmean(values := [r.rows[method][key] for r in runs]), statistics.stdev(values))
            for key in runs[0].rows[method]
        }
        for method in runs[0].rows
    }


def _trained(data: Examples, seed: int, progress: bool) -> tuple[nn.Module, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.create(**MODEL)
    start = time.perf_counter()
    train(model, data, epochs=EPOCHS, seed=seed, progress=progress)
    return model, time.perf_counter() - start


def _run_class(
    folder: Path,
    run: Run,
    model: nn.Module,
    posterior: Posterior,
    train_data: Images,
    test_data: Images,
    ablations: bool,
    backend: str,
    progress: bool,
) -> None:
    """Forget one class by each method, fill ``run.rows`` and write the run's folder."""
    forgotten = train_data.labels == train_data.classes.index(run.forget_class)

    def retain_read(source: Counted) -> int:
        return int(source.seen[~forgotten].sum())

    def unlearned(prior: Posterior) -> tuple[ForgetReport, dict[str, float]]:
        prior.mean_(model)
        source = Counted(train_data)
        forget_loader = loader(Selected(source, forgotten.nonzero().squeeze(-1)), batch_size=64, shuffle=True)
        result = forget(
            model, prior, forget_loader, objective="uniform-others", seed=run.seed, backend=backend, progress=progress
        )
        row = measure(model, train_data, test_data, run.forget_class)
        return result, {
            **row,
            "kl": result.kl,
            "seconds": result.seconds,
            "retain_read": retain_read(source),
        }

    before = predict(model, loader(test_data, batch_size=512))[0].argmax(dim=-1)
    result, run.rows["DiStruction"] = unlearned(posterior)
    after = predict(model, loader(test_data, batch_size=512))[0].argmax(dim=-1)
    posterior.save(folder / "posterior.safetensors")
    models.save(model, folder / "model.safetensors", {**MODEL, "data": "digits"})
    report.plot_curves(folder / "curves.png", result.history)
    mask = test_data.labels == train_data.classes.index(run.forget_class)
    groups = {}
    for title, where in (("forgotten", mask), ("retained", ~mask)):
        chosen = where.nonzero().squeeze(-1)[:10]
        groups[title] = (test_data.subset(chosen), before[chosen].tolist(), after[chosen].tolist())
    report.examples(groups).savefig(folder / "examples.png", dpi=150)

    source = Counted(train_data)
    retrained, seconds = _trained(Selected(source, (~forgotten).nonzero().squeeze(-1)), run.seed, progress)
    run.rows["retrain"] = {
        **measure(retrained, train_data, test_data, run.forget_class),
        "seconds": seconds,
        "retain_read": retain_read(source),
    }
    if ablations:
        _, run.rows["constant std"] = unlearned(constant_std(posterior))
        _, run.rows["Fisher std"] = unlearned(fisher_std(model, train_data, posterior))


def _finite(row: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if not math.isnan(v)}
