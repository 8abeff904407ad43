"""The main job on real data that needs no download: train, prepare, drop the data, forget, compare."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models, report
from .data import Images, forget_split, load, loader
from .fisher import per_sample
from .forget import ForgetReport, forget
from .metrics import accuracy, entropy_mia, predict
from .posterior import Posterior
from .prepare import prepare
from .train import train

EPOCHS = 40

COLUMNS = {
    "retain_test": "D_r test %",
    "forget_test": "D_f test %",
    "forget_train": "D_f train %",
    "mia": "MIA %",
    "kl": "KL nats",
    "seconds": "seconds",
    "retain_read": "retain read",
}


def measure(model: nn.Module, train_data: Images, test_data: Images, forget_class: str) -> dict[str, float]:
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

    The Fisher is the mean of squared per-example gradients of the log-likelihood (Laplace's usual diagonal).
    """
    fisher = per_sample(model, loader(data, batch_size=64))
    initial = posterior.metadata["std_init"] ** -2
    evidence = posterior.metadata["evidence"]
    return Posterior(
        posterior.means, {n: (initial + evidence * f).rsqrt() for n, f in fisher.items()}, posterior.metadata
    )


def run_demo(
    out: Path,
    *,
    forget_class: str,
    seed: int,
    overwrite: bool,
    ablations: bool,
    backend: str,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Run the demo and write its report folder; returns the metrics by method.

    Args:
        out: report folder; holds metrics.json, curves.png, examples.png, posterior.safetensors, model.safetensors.
        forget_class: digit to forget.
        seed: of everything that is drawn.
        overwrite: replace ``out`` where it exists.
        ablations: also forget with a constant std and with a diagonal Fisher std.
        backend: see `distruction.ops`.
        progress: show progress bars.
    """
    train_data, test_data = load("digits")
    forget_data, retain_data = forget_split(train_data, forget_class)
    config: dict[str, Any] = {"name": "vit-micro", "num_classes": len(train_data.classes), "in_chans": 1, "img_size": 8}
    rows: dict[str, dict[str, float]] = {}

    def trained(data: Images) -> tuple[nn.Module, float]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = models.create(**config)
        start = time.perf_counter()
        train(model, data, seed=seed, progress=progress)
        return model, time.perf_counter() - start

    def unlearned(model: nn.Module, posterior: Posterior) -> ForgetReport:
        posterior.mean_(model)
        forget_loader = loader(forget_data, batch_size=64, shuffle=True)
        return forget(model, posterior, forget_loader, seed=seed, backend=backend, progress=progress)

    with report.folder(out, overwrite=overwrite) as draft:
        model, seconds = trained(train_data)
        rows["baseline"] = {**measure(model, train_data, test_data, forget_class), "seconds": seconds}
        before = predict(model, loader(test_data, batch_size=512))[0].argmax(dim=-1)

        start = time.perf_counter()
        train_loader = loader(train_data, batch_size=64, shuffle=True)
        posterior = prepare(model, train_loader, seed=seed, backend=backend, progress=progress)
        rows["(preparation)"] = {"seconds": time.perf_counter() - start}
        posterior.save(draft / "posterior.safetensors")

        result = unlearned(model, posterior)
        models.save(model, draft / "model.safetensors", config)
        rows["DiStruction"] = {
            **measure(model, train_data, test_data, forget_class),
            "kl": result.history[-1].kl,
            "seconds": result.seconds,
            "retain_read": 0,
        }
        after = predict(model, loader(test_data, batch_size=512))[0].argmax(dim=-1)

        retrained, seconds = trained(retain_data)
        rows["retrain"] = {
            **measure(retrained, train_data, test_data, forget_class),
            "seconds": seconds,
            "retain_read": len(retain_data),
        }
        if ablations:
            for name, other in (
                ("constant std", constant_std(posterior)),
                ("Fisher std", fisher_std(_with_means(model, posterior), train_data, posterior)),
            ):
                ablated = unlearned(model, other)
                rows[name] = {
                    **measure(model, train_data, test_data, forget_class),
                    "kl": ablated.history[-1].kl,
                    "seconds": ablated.seconds,
                    "retain_read": 0,
                }

        report.plot_curves(draft / "curves.png", result.history)
        mask = test_data.labels == train_data.classes.index(forget_class)
        groups = {}
        for title, where in (("forgotten", mask), ("retained", ~mask)):
            chosen = where.nonzero().squeeze(-1)[:10]
            groups[title] = (test_data.subset(chosen), before[chosen], after[chosen])
        report.plot_examples(draft / "examples.png", groups)
        facts: dict[str, Any] = {
            "data": "digits",
            "model": config["name"],
            "forget_class": forget_class,
            "seed": seed,
            "backend": backend,
            "torch": torch.__version__.split("+")[0],
            "preparation": posterior.metadata,
            "metrics": {r: {k: v for k, v in m.items() if not math.isnan(v)} for r, m in rows.items()},
            "history": [vars(s) for s in result.history],
        }
        report.write_json(draft / "metrics.json", facts)
    return rows


def _with_means(model: nn.Module, posterior: Posterior) -> nn.Module:
    posterior.mean_(model)
    return model
