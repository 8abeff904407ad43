"""Seeds, and the random generators that a whole process shares: PyTorch's, NumPy's and Python's."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A 63-bit seed that differs for every tuple of small non-negative integers."""
    value = 0
    for part in parts:
        value = (value * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    return value


def seed_all(seed: int, own: Sequence[torch.Generator] = ()) -> None:
    """Seed the global generators of PyTorch (all devices), NumPy and Python, and ``own``, each for itself."""
    torch.manual_seed(seed)
    for generator in own:
        generator.manual_seed(seed)
    np.random.seed(np.array([seed % 2**32, seed >> 32], dtype=np.uint32))  # noqa: NPY002
    random.seed(seed)


@contextmanager
def private_generators(own: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """What is drawn from or done to the global generators and to ``own`` inside leaves no trace outside."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    states = [generator.get_state() for generator in own]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)
