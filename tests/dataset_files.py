"""Small data sets in the published formats, the same bytes for the same arguments."""

import gzip
import struct

import numpy as np


def pixels(count, shape, seed):
    """uint8 noise, (count, *shape)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def cycled(count, classes, seed):
    """Labels of which each class has count / classes, in random order."""
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def write_idx(folder, *, train=40, test=20, classes=10, side=28, zipped=True):
    """Four IDX files; returns {part: (images (N, side, side), labels)}."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = pixels(count, (side, side), seed), cycled(count, classes, seed)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)
        written["train" if part == "train" else "test"] = (images, labels)
    return written
