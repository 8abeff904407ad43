"""No unlearning: the model as it was trained."""

from .base import Method, Task


def baseline(task: Task) -> None:
    """Leave the model alone."""


METHOD = Method("the trained model, nothing unlearned", "-", baseline, reads="none")
