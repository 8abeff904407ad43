"""Data sets: uint8 images with labels, and loaders over them."""

from .images import Examples, Images, forget_split, grouped, hold_out, loader
from .sets import detect, load

__all__ = ["Examples", "Images", "detect", "forget_split", "grouped", "hold_out", "load", "loader"]
