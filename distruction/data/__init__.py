"""Data sets: uint8 images with labels, and loaders over them."""

from .images import Examples, Images, forget_split, loader
from .sets import load

__all__ = ["Examples", "Images", "forget_split", "load", "loader"]
