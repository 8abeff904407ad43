"""The tests and the benchmarks that need a GPU, in one go: ``python -m benchmarks.gpu``.

Within ten minutes on one H100 the results folder holds

- ``tests.xml`` and ``tests.log``: the tests marked ``gpu``;
- ``ops.json``, ``.csv`` and ``.png``: the ops and the whole optimizer step on the tensors of ViT-Ti, B, L and H beside
  their peers, as the time of the GPU's own work (`harness.QueuedTime`), with kernels launched, host time and memory;
- ``training.json``, ``.csv`` and ``.png``: steps of preparation beside AdamW's training steps;
- ``README.md``: the targets with what was reached, all tables, and what failed or was left out.

A contestant that fails loses its row, not the run. ``--dry-run`` passes the same way on a CPU with a tiny model.
"""

import gc
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn

from distruction.ops import backends

from . import contestants, harness
from .harness import Contestant, Row
from .our_ops import Workload

RESULTS = Path(__file__).with_name("results") / "gpu"
ROOT = Path(__file__).parents[1]

PLAN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ViT-B/16", ("step with prior", "optimizer step", "sample", "accumulate", "step without prior", "gaussian_kl")),
    ("ViT-L/16", ("step with prior", "sample", "gaussian_kl", "optimizer step")),
    # The optimizers' own states would not fit beside one another.
    ("ViT-H/14", ("step with prior", "sample")),
    ("ViT-Ti/16", ("step with prior", "optimizer step")),
)
"""Model to ops, the most telling first: what does not fit into the time is left out."""

COMPILED = {"ViT-B/16"}
"""The models on which torch.compile takes part, which needs about a minute of compilation for each."""

DRY = "tiny ViT"


def tiny_vit() -> nn.Module:
    """What stands for every model in a dry run."""
    return timm.models.VisionTransformer(img_size=16, patch_size=8, num_classes=8, embed_dim=16, depth=1, num_heads=2)


@dataclass
class Session:
    """One run: where it measures, until when, and what went wrong on the way."""

    device: torch.device
    out: Path
    deadline: float
    rounds: int
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """What fails inside is noted under ``name``, and the run goes on."""
        try:
            yield
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def backends(self) -> list[str]:
        """The kernels' backends that serve the device."""
        names = [b for b in backends.MODULES if b != "reference" and backends.unavailable(b, self.device.type) is None]
        # Interpreted kernels are no contestants.
        return [b for b in names if not (self.device.type == "cpu" and b == "triton")]


def run_tests(session: Session) -> dict[str, int]:
    """Run the tests marked ``gpu``; returns counts by outcome."""
    report = session.out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-rs", f"--junitxml={report}"]
    if session.device.type == "cuda" and find_spec("xdist"):
        command += ["-n", "4"]  # compilation takes most of the time
    with open(session.out / "tests.log", "w") as log, session.noting("the tests"):
        subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(session.remaining / 2, 30), check=True
        )
    if not report.exists():
        return {}
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    total = counts.pop("tests")
    return {"passed": total - sum(counts.values()), **counts}


def run_ops(session: Session, plan: Sequence[tuple[str, Sequence[str]]]) -> list[Row]:
    """Time the ops of ``plan`` and their peers."""
    rows: list[Row] = []
    for model, names in plan:
        shapes = [p.shape for p in tiny_vit().parameters()] if model == DRY else contestants.parameter_shapes(model)
        workload = None
        for name in names:
            title = f"{model}: {name}"
            if session.remaining < 20:
                session.left_out.append(f"{title}: no time was left")
                continue
            with session.noting(title), torch.no_grad():
                workload = workload or Workload(shapes, session.device)
                rows += _time_op(session, title, model, name, workload)
            _free()
        del workload
        _free()
    return rows


def _time_op(session: Session, title: str, model: str, name: str, workload: Workload) -> list[Row]:
    op = contestants.OPS[name]
    made: dict[str, Contestant] = {}
    for contestant, maker in op.makers(session.backends()).items():
        if contestant.startswith("torch.compile") and model not in COMPILED:
            continue
        # A peer whose package is not installed is left out.
        with session.noting(f"{title}: {contestant}"), suppress(ImportError):
            for suffix, run in maker(workload).items():
                run()
                harness.synchronize()
                made[contestant + suffix] = run
    if session.device.type == "cuda":
        for contestant in [c for c in made if c in ("distruction (triton)", "distruction (cuda)")]:
            with session.noting(f"{title}: {contestant}, CUDA graph"):
                made[f"{contestant}, CUDA graph"] = harness.graphed(made[contestant])
    made[harness.COPY] = harness.copy(4 * op.arrays * workload.numel, session.device)
    rows = _measure(
        session,
        made,
        harness.QueuedTime() if session.device.type == "cuda" else harness.wall_time,
        baseline=contestants.BASELINE,
        limit=harness.COPY,
        model=model,
        parameters=workload.numel,
        op=name,
    )
    print(harness.markdown(rows), flush=True)
    return rows


def run_training(session: Session, backends_: Sequence[str]) -> list[Row]:
    """Time steps of preparation and AdamW's training steps: ViT-B/16, batches of 64 images of 224 x 224 pixels."""
    dry = session.device.type == "cpu"
    batch, size, classes = (2, 16, 8) if dry else (64, 224, 1000)
    title = DRY if dry else f"ViT-B/16, batch {batch}"

    def create() -> nn.Module:
        with session.device:
            return tiny_vit() if dry else timm.create_model(contestants.MODELS["ViT-B/16"], num_classes=classes)

    generator = torch.Generator(session.device).manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=session.device, generator=generator)
    targets = torch.randint(classes, (batch,), device=session.device, generator=generator)
    made: dict[str, Contestant] = {}
    for name, make in contestants.training_steps(create, images, targets, backends_).items():
        with session.noting(f"training step: {name}"):
            made[name] = make()
            made[name]()
    return _measure(
        session,
        made,
        harness.event_time if session.device.type == "cuda" else harness.wall_time,
        baseline=contestants.ADAMW,
        limit=None,
        model=title,
        parameters=sum(p.numel() for p in create().parameters()),
        op="training step",
    )


def _measure(
    session: Session, made: Mapping[str, Contestant], timer: harness.Timer, *, limit: str | None, **which: Any
) -> list[Row]:
    timings = harness.measure(made, timer, rounds=session.rounds, budget=min(5.0, session.remaining / 10))
    details: dict[str, dict[str, Any]] = {}
    for name, run in made.items():
        # Of one call: a repeated contestant's host time and launches are a mean over its calls.
        times = run.times if isinstance(run, harness.Repeated) else 1
        details[name] = {"host": round(1e3 * harness.host_time(run) / times, 4)}
        if session.device.type == "cuda":
            with session.noting(f"{which['model']}: {which['op']}: launches and memory of {name}"):
                details[name] |= {
                    "launches": round(harness.launches(run) / times),
                    "peak": round(harness.peak_memory(run) / 2**20, 1),
                }
    return harness.rows_of(timings, limit=limit, threads=torch.get_num_threads(), details=details, **which)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- what was reached --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that the kernels are meant to reach."""

    what: str
    value: Callable[[Mapping[tuple[str, str, str], Row]], float]
    bound: float
    at_least: bool

    def line(self, rows: Mapping[tuple[str, str, str], Row]) -> list[str]:
        """What is wanted, what was measured ("-" where it was not), and whether it was reached."""
        wanted = f"{'>=' if self.at_least else '<='} {self.bound:g}"
        try:
            value = self.value(rows)
        except KeyError:
            return [self.what, wanted, "-", "not measured"]
        reached = value >= self.bound if self.at_least else value <= self.bound
        return [self.what, wanted, f"{value:.3g}", "yes" if reached else "no"]


def targets_of(ours: str) -> list[Target]:
    """The targets, for the contestant ``ours``."""
    prior = "step with prior"
    vit, training = "ViT-B/16", "ViT-B/16, batch 64"

    def of_limit(model: str) -> Target:
        return Target(
            f"{prior}, {model}: of the copy's speed", lambda r: r[model, prior, ours].of_limit or 0.0, 0.9, True
        )

    return [
        of_limit("ViT-L/16"),
        of_limit("ViT-H/14"),
        Target(
            f"{prior}, {vit}: kernels (update, sum of the KL)", lambda r: r[vit, prior, ours].launches or 0, 2, False
        ),
        Target(f"{prior}, {vit}: speed-up over eager", lambda r: r[vit, prior, ours].speedup or 0.0, 8, True),
        Target(
            f"optimizer step, {vit}: times AdamW fused",
            lambda r: r[vit, "optimizer step", ours].median / r[vit, "optimizer step", contestants.ADAMW].median,
            1.7,
            False,
        ),
        Target(
            f"training step, {training}: preparation, times AdamW fused",
            lambda r: (
                r[training, "training step", f"{ours}, preparation, K = 1"].median
                / r[training, "training step", contestants.ADAMW].median
            ),
            1.05,
            False,
        ),
    ]


def page(
    session: Session, facts: Mapping[str, Any], tests: Mapping[str, int], ops: Sequence[Row], training: Sequence[Row]
) -> str:
    """The results as Markdown."""
    rows = {(r.model, r.op, r.contestant): r for r in [*ops, *training]}
    lines = [["target", "wanted", "measured", "reached"], ["---", "---", "---:", "---"]]
    lines += [t.line(rows) for t in targets_of("distruction (triton)")]
    parts = [
        f"# {facts['device']}",
        f"`{facts['command']}`; {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}",
        "Tests marked `gpu`: " + (", ".join(f"{v} {k}" for k, v in tests.items()) or "not run"),
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        *(
            "\n".join([f"## {model}", "", harness.markdown([r for r in ops if r.model == model])])
            for model in dict.fromkeys(r.model for r in ops)
        ),
    ]
    if training:
        parts.append("\n".join(["## Training steps", "", harness.markdown(training)]))
    for title, entries in (
        ("Failed", [f"{k}: {v}" for k, v in session.failed.items()]),
        ("Left out", session.left_out),
    ):
        if entries:
            parts.append("\n".join([f"## {title}", "", *(f"- {e}" for e in entries)]))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def driver(device: torch.device) -> dict[str, str]:
    """The driver's version, clocks and power limit, as ``nvidia-smi`` names them, where it is."""
    names = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return dict(zip(names, answer.split(", "), strict=False))


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after this time.")] = 9.5,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each contestant.")] = 25,
    tests: Annotated[bool, typer.Option(help="Run the tests marked gpu first.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, with a tiny model.")] = False,
) -> None:
    """Run the GPU's tests and benchmarks."""
    if not (dry_run or torch.cuda.is_available()):
        sys.exit("PyTorch finds no CUDA or ROCm device; --dry-run goes through the same steps on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    session = Session(torch.device("cpu" if dry_run else "cuda"), out, time.monotonic() + 60 * minutes, rounds)
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    facts = {"command": command, **harness.environment(session.device), **driver(session.device)}
    session.left_out += [
        f"backend {name}: {reason}"
        for name in backends.MODULES
        if (reason := backends.unavailable(name, session.device.type)) is not None
    ]
    counts = run_tests(session) if tests else {}
    training: list[Row] = []
    with session.noting("training steps"):
        training = run_training(session, session.backends())
    _free()
    ops = run_ops(session, [(DRY, tuple(contestants.OPS))] if dry_run else PLAN)
    facts |= {"tests": counts, "failed": session.failed, "left_out": session.left_out}
    for name, rows in (("ops", ops), ("training", training)):
        if rows:
            harness.write(out / name, rows, facts)
    (out / "README.md").write_text(text := page(session, facts, counts, ops, training))
    print(text)
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    typer.run(main)
