"""The arms of the tables, and the grids that their step sizes were chosen from on seed 0."""

import math

from .arms import Arm

DEPTHS = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Nats per token of the forgotten answers at which arms are compared."""
_DEEP = {"threshold": math.exp(-6.0), "steps": 200}

GRIDS: dict[str, tuple[Arm, tuple[float, ...]]] = {
    "depth, learned std": (Arm("ours", 1.0, level=0.002, **_DEEP), (0.3, 1.0, 3.0)),
    "depth, constant std": (Arm("ours", 1.0, prior="constant", level=0.002, **_DEEP), (0.3, 1.0, 3.0)),
    "depth, no prior": (Arm("bounded", 1e-3, **_DEEP), (1e-4, 3e-4, 1e-3)),
    "GA": (Arm("ascent", 1e-3), (1e-4, 3e-4, 1e-3)),
    "NPO": (Arm("npo", 1e-3), (1e-4, 3e-4, 1e-3)),
    "SimNPO": (Arm("simnpo", 1e-3), (1e-4, 3e-4, 1e-3)),
    "GradDiff (retain data)": (Arm("ascent", 1e-3, retain=True), (1e-4, 3e-4, 1e-3)),
    "NPO (retain data)": (Arm("npo", 1e-3, retain=True), (3e-4, 1e-3, 3e-3)),
}

_OTHERS = {
    "GA": Arm("ascent", 3e-4),
    "NPO": Arm("npo", 3e-4),
    "SimNPO": Arm("simnpo", 3e-4),
    "no prior, bounded-ce": Arm("bounded", 3e-4),
    "GradDiff (retain data)": Arm("ascent", 3e-4, retain=True),
    "NPO (retain data)": Arm("npo", 1e-3, retain=True),
}
_OURS = {
    "ours, bounded-ce": Arm("ours", 1.0),
    "ours, bounded-ce, constant std": Arm("ours", 1.0, prior="constant"),
    "ours, masked-teacher": Arm("ours", 1.0, objective="masked-teacher"),
    "ours, uniform-others": Arm("ours", 1.0, objective="uniform-others"),
    "ours, marginal": Arm("ours", 1.0, objective="marginal"),
    "ours, levelled": Arm("ours", 1.0, objective="levelled"),
    "ours, npo": Arm("ours", 1.0, objective="npo"),
    "ours, simnpo": Arm("ours", 1.0, objective="simnpo"),
}
ARMS: dict[str, dict[str, Arm]] = {key: {**_OTHERS, **_OURS} for key in ("codes", "authors", "canaries")}
"""Of the tables, by scenario."""
DEPTH = {
    "learned std": GRIDS["depth, learned std"][0],
    "constant std": GRIDS["depth, constant std"][0],
    "no prior": GRIDS["depth, no prior"][0],
}
"""Of the curves at matched depth."""
