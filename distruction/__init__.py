"""Fast, honest machine unlearning for PyTorch: Bayesian Gradient Descent and DiStruction."""

from .errors import DistructionError, NonFiniteError, PosteriorError, RankError, UsageError
from .forget import ForgetReport, forget
from .loop import Callback, Step
from .loss import GaussianKL, gaussian_kl
from .optim import BGD
from .posterior import Posterior
from .prepare import prepare

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
]
