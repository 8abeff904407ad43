"""What the optimizer costs beside training itself: ``python -m benchmarks.whole_job``.

Writes ``whole_job.json`` and ``whole_job.md``.

Counted for an H100 by its published figures: the FLOPs of a forward and backward pass at its peak in a type, and the
optimizer's bytes at its memory bandwidth. A pass reaches less of its peak than an optimizer of its bandwidth, so that
the shares are the largest that may be expected. Measured on the CPU, on one thread and a smaller batch whose time is
scaled to the batch's size.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distruction import BGD, Posterior
from distruction.files import write_atomically
from distruction.forgetting import STEPS
from distruction.preparation import METHODS

from . import harness

RESULTS = Path(__file__).parent / "results" / "costs"
MODELS = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
}
BATCH = 64
DATA = {"CIFAR-100": 50_000, "ImageNet-1k": 1_281_167}
"""Training examples; CIFAR's are resized to the models' 224 x 224."""

# NVIDIA H100 Tensor Core GPU data sheet, SXM5, without sparsity.
PEAKS = {"bfloat16": 989.4e12, "TF32": 494.7e12, "float32": 66.9e12}
BANDWIDTH = 3.35e12

PREPARE = 20
"""Bytes per parameter of a Gauss-Newton step: reads the gradient, mean and std, writes std and the next sample."""
FORGET = 20 + 36
"""Likewise of an update of one antithetic pair with a prior, hence of two passes."""
ADAMW = 28
"""Likewise of AdamW, fused: reads the gradient, reads and writes weight and both moments."""

PREPARE_STEPS = METHODS["gauss-newton"]
FORGET_STEPS = STEPS
"""The defaults: of `prepare`; of `forget` with a given kl_weight (with "auto" it ends by itself)."""
PASSES_OF_FORGET = 2 + 1 / 3
"""Forward and backward passes of an update of `forget`: two samples, and the teacher's forward pass, a third of one."""


def flops_of_a_pass(name: str) -> int:
    """FLOPs of a forward and backward pass over `BATCH` images, counted on shapes alone."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
        images = torch.empty(BATCH, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images).sum().backward()
    return counter.get_total_flops()


def job(step: dict[str, float], passing: float) -> dict[str, float]:
    """The parts of a job, in seconds or any unit, as shares.

    Args:
        step: time of a step of preparation, of an update of forgetting, and of AdamW.
        passing: time of a forward and backward pass.
    """
    shares = {
        "optimizer / pass, prepare": step["prepare"] / passing,
        "optimizer / passes, forget": step["forget"] / (PASSES_OF_FORGET * passing),
    }
    for data, examples in DATA.items():
        epoch = examples / BATCH * (passing + step["adamw"])
        shares[f"prepare / epoch of {data}"] = PREPARE_STEPS * (passing + step["prepare"]) / epoch
        shares[f"forget / epoch of {data}"] = FORGET_STEPS * (PASSES_OF_FORGET * passing + step["forget"]) / epoch
    return shares


def counted(name: str) -> dict[str, Any]:
    """A model's job on an H100 by its figures, for each type of the passes."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm.create_model(name, num_classes=1000).parameters())
    flops = flops_of_a_pass(name)
    moved = {"prepare": PREPARE, "forget": FORGET, "adamw": ADAMW}
    step = {k: parameters * b / BANDWIDTH for k, b in moved.items()}
    jobs = {dtype: job(step, flops / peak) for dtype, peak in PEAKS.items()}
    return {"parameters": parameters, "FLOPs of a pass": flops, "shares": jobs}


def measured(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """A model's job on this CPU, on one thread; medians of process time, passes and steps by turns."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000)
    images, targets = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    prior = Posterior.around(model, 0.01)

    def passing() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()

    optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "prepare": lambda: BGD(model.named_parameters(), std_init=0.01, statistic="gauss-newton", learn_mean=False),
        "forget": lambda: BGD(model.named_parameters(), std_init=prior, prior=prior, kl_weight=0.1, mc_samples=2),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
    }
    passing()
    seconds: dict[str, list[float]] = {"pass": []}
    for kind, make in optimizers.items():
        opt = make()
        if isinstance(opt, BGD):
            opt.train()
        calls = 2 if kind == "forget" else 1
        for _ in range(calls):
            opt.step()
        seconds[kind] = []
        for _ in range(rounds):
            seconds["pass"].append(harness.wall_time(passing))
            seconds[kind].append(sum(harness.wall_time(opt.step) for _ in range(calls)))
        if isinstance(opt, BGD):
            opt.eval()
        del opt
        gc.collect()
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    whole = medians.pop("pass") * BATCH / batch
    return {"batch measured": batch, "seconds": {"pass": whole, **medians}, "shares": job(medians, whole)}


def markdown(result: dict[str, Any]) -> str:
    """The shares as a table."""
    rows = []
    for model, found in result["counted"].items():
        rows += [(f"{model}, H100, {dtype}", shares) for dtype, shares in found["shares"].items()]
    for model, found in result["measured"].items():
        note = f"{model}, CPU, 1 thread (batch of {found['batch measured']}, scaled)"
        rows.append((note, found["shares"]))
    head = list(rows[0][1])
    lines = [f"| | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    lines += [f"| {name} | {' | '.join(f'{shares[k]:.2%}' for k in head)} |" for name, shares in rows]
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
    measure: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a measured pass.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes and steps of each kind.")] = 3,
) -> None:
    """Count and measure what preparation and forgetting cost beside training."""
    torch.set_num_threads(1)
    result = {
        "command": " ".join(["python -m benchmarks.whole_job", *sys.argv[1:]]),
        **harness.environment(torch.device("cpu")),
        "batch": BATCH,
        "counted": {model: counted(name) for model, name in MODELS.items()},
        "measured": {model: measured(MODELS[model], batch, rounds) for model in measure or ("ViT-Ti/16", "ViT-B/16")},
    }
    table = markdown(result)
    print(table, end="")
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table)):

        def write(name: str, text: str = text) -> None:
            Path(name).write_text(text)

        write_atomically(out / f"whole_job{suffix}", write)


if __name__ == "__main__":
    typer.run(main)
