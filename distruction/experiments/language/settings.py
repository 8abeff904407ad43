"""The arms of the tables, and the grids that their step sizes or strengths were chosen from on seed 0."""

import math
from typing import Any

from .arms import Arm

DEPTHS = (2.0, 4.0, 6.0, 7.0, 8.0)
"""Nats per token of the forgotten answers at which arms are compared."""
_OURS: dict[str, Any] = {"steps": 100, "level": 0.001}
_UNIFORM: dict[str, Any] = {"objective": "uniform-others", "steps": 150, "level": 0.0001}
_BOUNDED: dict[str, Any] = {"threshold": math.exp(-10.0)}
_TO_10_NATS = "no prior, bounded-ce to 10 nats"


def is_curve(name: str) -> bool:
    """Whether an arm of this name is followed to a depth and compared there, and is no row of a table."""
    return name.startswith("depth, ")


GRIDS: dict[str, tuple[Arm, tuple[float, ...]]] = {
    "depth, uniform-others: learned std": (Arm("ours", 3.0, **_UNIFORM), (0.1, 0.3, 1.0, 3.0)),
    "depth, uniform-others: constant std": (
        Arm("ours", 3.0, prior="constant", **_UNIFORM),
        (0.1, 0.3, 1.0, 3.0),
    ),
    "depth, uniform-others: no prior": (Arm("uniform-others", 1e-4, steps=150), (1e-5, 3e-5, 1e-4, 3e-4)),
    "depth, bounded-ce: learned std": (Arm("ours", 1.0, **_BOUNDED, **_OURS), (0.3, 1.0, 3.0)),
    "depth, bounded-ce: constant std": (Arm("ours", 1.0, prior="constant", **_BOUNDED, **_OURS), (0.3, 1.0, 3.0)),
    "depth, bounded-ce: no prior": (Arm("bounded", 1e-5, **_BOUNDED, steps=150), (1e-5, 3e-5, 1e-4, 3e-4)),
    _TO_10_NATS: (
        Arm("bounded", 3e-5, **_BOUNDED, steps=150, nats=10.0),
        (1e-5, 3e-5, 1e-4, 3e-4),
    ),
    "GA": (Arm("ascent", 3e-5), (3e-5, 1e-4, 3e-4)),
    "NPO": (Arm("npo", 3e-5), (3e-5, 1e-4, 3e-4)),
    "SimNPO": (Arm("simnpo", 3e-5), (3e-5, 1e-4, 3e-4)),
    "no prior, bounded-ce": (Arm("bounded", 3e-5), (3e-5, 1e-4, 3e-4)),
    "GradDiff (retain data)": (Arm("ascent", 3e-4, retain=True), (1e-4, 3e-4, 1e-3)),
    "NPO (retain data)": (Arm("npo", 1e-4, retain=True), (1e-4, 3e-4, 1e-3)),
}
"""What `--tune` tries on seed 0; each arm stands here with the step size that is used."""

OURS = {
    "ours, uniform-others": Arm("ours", 1.0, objective="uniform-others", level=0.05),
    "ours, masked-teacher": Arm("ours", 1.0, objective="masked-teacher", level=0.15),
    "ours, bounded-ce": Arm("ours", 1.0),
    "ours, npo": Arm("ours", 1.0, objective="npo"),
    "ours, uniform-others, constant std": Arm("ours", 1.0, objective="uniform-others", prior="constant", level=0.05),
}
STRENGTHS: dict[str, tuple[Arm, tuple[float, ...]]] = {
    "ours, bounded-ce to 10 nats, lambda given": (
        Arm("ours", 1.0, tokens=3e3, steps=60, **_BOUNDED),
        (3e3, 5e3, 1e4, 3e4, 1e5),
    ),
    "ours, bounded-ce to 10 nats, lambda given, constant std": (
        Arm("ours", 1.0, tokens=1e4, steps=60, prior="constant", **_BOUNDED),
        (3e3, 5e3, 1e4, 3e4, 1e5),
    ),
    "ours, rmu, lambda given": (Arm("ours", 1.0, objective="rmu", tokens=1e2, steps=60), (1e2, 3e2, 1e3, 1e4, 1e5)),
}
"""The same of a given strength, in tokens."""
OF_CODES = {
    "ours, simnpo": Arm("ours", 1.0, objective="simnpo"),
    **{name: arm for name, (arm, _) in STRENGTHS.items()},
    _TO_10_NATS: GRIDS[_TO_10_NATS][0],
}
"""Ways to forget that were tried on the codes alone."""
ANCHORED = {
    "ours, uniform-others, anchors": Arm("ours", 1.0, objective="uniform-others", level=0.05, anchors=32),
    "ours, masked-teacher, anchors": Arm("ours", 1.0, objective="masked-teacher", level=0.15, anchors=32),
}
REPAIRED = {"NPO (retain data), 100 steps": Arm("npo", 3e-4, retain=True, stopped=False)}
"""Reads retained data long enough to learn again what goes with the forgotten."""
DEPTH = {name: arm for name, (arm, _) in GRIDS.items() if is_curve(name)}
"""Of the curves at matched depth."""
_OTHERS = {k: arm for k, (arm, _) in GRIDS.items() if k not in {*DEPTH, _TO_10_NATS}}
ARMS: dict[str, dict[str, Arm]] = {
    "codes": {**OURS, **OF_CODES, **_OTHERS},
    "authors": {**OURS, **ANCHORED, **_OTHERS, **REPAIRED},
    "canaries": {**OURS, **_OTHERS},
}
"""Of the tables, by scenario."""
