"""The arms of the tables, and the grids that their step sizes were chosen from on seed 0."""

import math
from typing import Any

from .arms import Arm

DEPTHS = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Nats per token of the forgotten answers at which arms are compared."""
_DEEP: dict[str, Any] = {"threshold": math.exp(-6.0), "steps": 200}

GRIDS: dict[str, tuple[Arm, tuple[float, ...]]] = {
    "depth: learned std": (Arm("ours", 1.0, level=0.003, **_DEEP), (0.3, 1.0, 3.0)),
    "depth: constant std": (Arm("ours", 1.0, prior="constant", level=0.003, **_DEEP), (0.3, 1.0, 3.0)),
    "depth: no prior": (Arm("bounded", 3e-5, **_DEEP), (1e-5, 3e-5, 1e-4, 3e-4)),
    "GA": (Arm("ascent", 1e-4), (3e-5, 1e-4, 3e-4)),
    "NPO": (Arm("npo", 1e-4), (3e-5, 1e-4, 3e-4)),
    "SimNPO": (Arm("simnpo", 1e-4), (3e-5, 1e-4, 3e-4)),
    "no prior, bounded-ce": (Arm("bounded", 1e-4), (3e-5, 1e-4, 3e-4)),
    "GradDiff (retain data)": (Arm("ascent", 1e-4, retain=True), (1e-4, 3e-4, 1e-3)),
    "NPO (retain data)": (Arm("npo", 3e-4, retain=True), (1e-4, 3e-4, 1e-3)),
}
"""What `--tune` tries on seed 0; each arm stands here with the step size that is used."""

OURS = {
    "ours, bounded-ce": Arm("ours", 1.0),
    "ours, bounded-ce, constant std": Arm("ours", 1.0, prior="constant"),
    "ours, uniform-others, level 0.05": Arm("ours", 1.0, objective="uniform-others", level=0.05),
    "ours, masked-teacher, level 0.3": Arm("ours", 1.0, objective="masked-teacher", level=0.3),
    "ours, npo": Arm("ours", 1.0, objective="npo"),
    "ours, simnpo": Arm("ours", 1.0, objective="simnpo"),
}
ANCHORED = {"ours, bounded-ce, anchors": Arm("ours", 1.0, anchors=32)}
DEPTH = {name: arm for name, (arm, _) in GRIDS.items() if name.startswith("depth")}
"""Of the curves at matched depth."""
ARMS: dict[str, dict[str, Arm]] = {
    name: {**OURS, **(ANCHORED if name == "authors" else {}), **{k: a for k, (a, _) in GRIDS.items() if k not in DEPTH}}
    for name in ("codes", "authors", "canaries")
}
"""Of the tables, by scenario."""
