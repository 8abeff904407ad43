"""Bayesian Gradient Descent: `BGD`, a ``torch.optim`` optimizer, and its parts.

``bgd`` is the class that a user reads, ``groups`` its inside, ``options`` what it can be told, ``counters`` the Monte
Carlo phase, ``update`` one call of the ops, ``state`` what it takes over from others, ``release`` gradients that the
backward pass drops.
"""

from .bgd import BGD
from .update import STREAMED_ELEMENTS

__all__ = ["BGD", "STREAMED_ELEMENTS"]
