"""The loop that `prepare` and `forget` share: seeded batches, progress, checkpoints, and weights that end as means."""

from .batches import Batch, Batches
from .checkpoint import Checkpoint
from .run import run
from .schedules import cosine, rising
from .step import Callback, Step

__all__ = ["Batch", "Batches", "Callback", "Checkpoint", "Step", "cosine", "rising", "run"]
