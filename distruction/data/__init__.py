"""Data sets: uint8 images with labels, and loaders over them."""

from .images import Images, forget_split, load, loader

__all__ = ["Images", "forget_split", "load", "loader"]
