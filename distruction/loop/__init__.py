"""The loop that `prepare` and `forget` share: seeded batches, progress, checkpoints, and weights that end as means."""

from .batches import Batch, Batches
from .checkpoint import Checkpoint
from .loaders import FORGET_SET, TRAINING, Role, check_loader, examples_in
from .run import run
from .schedules import cosine, rising
from .step import Callback, Controller, Step, Terminated

__all__ = [
    "FORGET_SET",
    "TRAINING",
    "Batch",
    "Batches",
    "Callback",
    "Checkpoint",
    "Controller",
    "Role",
    "Step",
    "Terminated",
    "check_loader",
    "cosine",
    "examples_in",
    "rising",
    "run",
]
