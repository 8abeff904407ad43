"""Small data sets in the published formats, the same bytes for the same arguments.

Each writer returns ``{"train": (images, labels), "test": (images, labels)}`` in the order in which a reader should give
them; images are uint8, (N, channels, height, width).
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
from typing import ClassVar

import numpy as np
from PIL import Image

from distruction.data import names

COARSE = [
    [4, 30, 55, 72, 95], [1, 32, 67, 73, 91], [54, 62, 70, 82, 92], [9, 10, 16, 28, 61], [0, 51, 53, 57, 83],
    [22, 39, 40, 86, 87], [5, 20, 25, 84, 94], [6, 7, 14, 18, 24], [3, 42, 43, 88, 97], [12, 17, 37, 68, 76],
    [23, 33, 49, 60, 71], [15, 19, 21, 31, 38], [34, 63, 64, 66, 75], [26, 45, 77, 79, 99], [2, 11, 35, 46, 98],
    [27, 29, 44, 78, 93], [36, 50, 65, 74, 80], [47, 52, 56, 59, 96], [8, 13, 48, 58, 90], [41, 69, 81, 85, 89],
]  # fmt: skip
"""Fine label numbers of CIFAR-100 by coarse label, as Chundawat et al. 2022 and Foster et al. 2024 list them."""


def coarse_of(fine):
    """CIFAR-100's coarse labels."""
    table = np.empty(100, np.int64)
    for number, members in enumerate(COARSE):
        table[members] = number
    return table[fine]


def parts(train, test, classes, shape):
    """Images that resemble a coarse pattern of their class, each class about equally often, in random order."""
    channels, height, width = shape
    blocks = np.random.default_rng(classes).integers(0, 192, (classes, channels, -(-height // 8), -(-width // 8)))
    patterns = blocks.repeat(8, axis=2).repeat(8, axis=3)[:, :, :height, :width]
    made = {}
    for seed, (part, count) in enumerate((("train", train), ("test", test))):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(count) % classes)
        made[part] = ((patterns[labels] + rng.integers(0, 64, (count, *shape))).astype(np.uint8), labels)
    return made


def write_idx(folder, *, train=40, test=20, classes=10, side=28, zipped=True):
    """MNIST's four files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = parts(train, test, classes, (1, side, side))
    for prefix, (images, labels) in (("train", made["train"]), ("t10k", made["test"])):
        arrays = {f"{prefix}-images-idx3-ubyte": images[:, 0], f"{prefix}-labels-idx1-ubyte": labels.astype(np.uint8)}
        for name, array in arrays.items():
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)
    return made


class _Python2Pickler(pickle._Pickler):
    """Writes byte strings with the opcodes of Python 2, in which CIFAR's archives were made."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        raw = value.encode() if isinstance(value, str) else value
        short = len(raw) < 256
        size = struct.pack("<B" if short else "<i", len(raw))
        self.write((pickle.SHORT_BINSTRING if short else pickle.BINSTRING) + size + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value):
    """``value`` as Python 2 and the NumPy of its time pickled it."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(name, *, train=100, test=50):
    """(folder, {file: content}, parts) of ``cifar10`` or ``cifar100``."""
    made = parts(train, test, 10 if name == "cifar10" else 100, (3, 32, 32))

    def batch(images, labels, title):
        facts = {b"batch_label": title, b"filenames": [b"%06d.png" % i for i in range(len(labels))]}
        if name == "cifar10":
            facts[b"labels"] = labels.tolist()
        else:
            facts |= {b"fine_labels": labels.tolist(), b"coarse_labels": coarse_of(labels).tolist()}
        return {**facts, b"data": images.reshape(len(images), 3072)}

    if name == "cifar10":
        folder = "cifar-10-batches-py"
        chunks = zip(*(np.array_split(a, 5) for a in made["train"]), strict=True)
        files = {f"data_batch_{i}": batch(*c, b"training batch %d of 5" % i) for i, c in enumerate(chunks, 1)}
        files["test_batch"] = batch(*made["test"], b"testing batch 1 of 1")
        files["batches.meta"] = {
            b"num_cases_per_batch": train // 5, b"label_names": [n.encode() for n in names.CIFAR10], b"num_vis": 3072
        }  # fmt: skip
    else:
        folder = "cifar-100-python"
        files = {part: batch(*made[part], b"%sing batch 1 of 1" % part.encode()) for part in ("train", "test")}
        files["meta"] = {
            b"fine_label_names": [n.encode() for n in names.CIFAR100],
            b"coarse_label_names": [n.encode() for n in names.CIFAR20],
        }
    return folder, {file: python2_pickle(content) for file, content in files.items()}, made


def write_cifar(root, name, *, archive=False, **sizes):
    """The Python archive of ``cifar10`` or ``cifar100``, as a folder or as the .tar.gz."""
    folder, files, made = cifar_files(name, **sizes)
    root.mkdir(parents=True, exist_ok=True)
    if archive:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file, content in files.items():
                member = tarfile.TarInfo(f"{folder}/{file}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        stem = "cifar-10-python" if name == "cifar10" else "cifar-100-python"
        (root / f"{stem}.tar.gz").write_bytes(gzip.compress(packed.getvalue(), mtime=0))
    else:
        (root / folder).mkdir()
        for file, content in files.items():
            (root / folder / file).write_bytes(content)
    return made


def png(image):
    """A (channels, height, width) image as a PNG file's bytes."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder, columns, classes, *, shape=(3, 32, 32), shards=2, metadata=True, train=40, test=20):
    """Parquet files as the Hugging Face hub has them.

    Args:
        columns: names of the image column and of each label column; ``coarse_label`` is derived from the fine one.
        classes: names of the (fine) labels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    made = parts(train, test, len(classes), shape)
    image, *labels = columns
    features = {label: {"names": list(classes), "_type": "ClassLabel"} for label in labels if label != "coarse_label"}
    header = {"huggingface": json.dumps({"info": {"features": {image: {"_type": "Image"}, **features}}})}
    for part, (pixels, numbers) in made.items():
        pieces = shards if part == "train" else 1
        for shard, positions in enumerate(np.array_split(np.arange(len(numbers)), pieces)):
            rows = [{"bytes": png(pixels[i]), "path": None} for i in positions]
            columns = {image: pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
            for label in labels:
                mine = numbers[positions]
                columns[label] = pa.array(coarse_of(mine) if label == "coarse_label" else mine, pa.int64())
            table = pa.table(columns).replace_schema_metadata(header if metadata else None)
            pq.write_table(table, folder / f"{part}-{shard:05d}-of-{pieces:05d}.parquet")
    return made


def write_tree(root, folders, *, shape=(3, 32, 32), train=40, test=20, test_name="test"):
    """``root/train/FOLDER/00000.png`` and ``root/TEST_NAME/FOLDER/00000.png``, the folders in the labels' order."""
    made = parts(train, test, len(folders), shape)
    found = {}
    for part, (pixels, numbers) in made.items():
        # A reader goes through the folders by name.
        order = sorted(range(len(numbers)), key=lambda i: (folders[numbers[i]], i))
        for position in order:
            place = root / (part if part == "train" else test_name) / folders[numbers[position]]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{position:05d}.png").write_bytes(png(pixels[position]))
        found[part] = (pixels[order], numbers[order])
    return found
