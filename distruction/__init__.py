"""Fast, honest machine unlearning for PyTorch: Bayesian Gradient Descent and DiStruction."""

import importlib
from types import ModuleType

from .errors import DistructionError, NonFiniteError, PosteriorError, RankError, UsageError
from .forget_report import ForgetReport
from .forgetting import forget
from .loop import Callback, Step
from .loss import GaussianKL, gaussian_kl
from .optim import BGD
from .posterior import Posterior
from .preparation import prepare
from .rehearsal import rehearse

__version__ = "0.1.0"

__all__ = [
    "BGD",
    "Callback",
    "DistructionError",
    "ForgetReport",
    "GaussianKL",
    "NonFiniteError",
    "Posterior",
    "PosteriorError",
    "RankError",
    "Step",
    "UsageError",
    "forget",
    "gaussian_kl",
    "prepare",
    "rehearse",
]

_SUBMODULES = (
    "experiments",
    "adapters",
    "anchors",
    "data",
    "distributed",
    "errors",
    "loggers",
    "methods",
    "language_metrics",
    "metrics",
    "models",
    "objectives",
    "ops",
    "planning",
    "receipts",
    "request_report",
    "sources",
    "task_objectives",
)


def __getattr__(name: str) -> ModuleType:
    """``distruction.planning`` and the like without an import of their own, loaded when they are first named."""
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
