"""The generator's contract: Random123's known answers, the normal distribution, and independence of the launch."""

import pytest
import torch
from scipy import stats

from distruction.ops.reference.philox import box_muller, philox, words_and_normals

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def normals(numel, **options):
    arguments = {"offset": 0, "stream": 0, "seed": 1, "draw": 0, "antithetic": False, "device": torch.device("cpu")}
    return words_and_normals(numel, **{**arguments, **options})[1]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = [torch.tensor([int(w, 16)]) for w in counter.split()]
    low, high = (int(w, 16) for w in key.split())
    assert [f"{w.item():08x}" for w in philox(words, low | high << 32)] == answer.split()


def test_negative_seed_is_its_twos_complement():
    assert torch.equal(normals(8, seed=-1), normals(8, seed=2**64 - 1))


def test_ten_million_normals():
    eps = normals(10**7)
    n = eps.numel()
    # Standard errors of the first four moments of a standard normal.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((eps**power).mean().item() - moment) < 4.5 * (variance / n) ** 0.5
    assert stats.kstest(eps.numpy(), "norm").pvalue > 1e-3
    lags = [(eps[:-k] * eps[k:]).mean().item() for k in (1, 2, 3, 4)]
    assert max(map(abs, lags)) < 4.5 / n**0.5


@pytest.mark.parametrize("word", [0, 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_every_word_gives_a_finite_normal(word):
    n0, n1 = box_muller(torch.tensor([word]), torch.tensor([word]))
    assert n0.isfinite().all()
    assert n1.isfinite().all()
    assert max(abs(n0.item()), abs(n1.item())) < 6.8


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 100])
def test_a_shard_draws_what_the_whole_tensor_would(offset):
    assert torch.equal(normals(150)[offset : offset + 33], normals(33, offset=offset))


def test_streams_draws_and_seeds_differ():
    base = normals(64)
    for change in ({"stream": 1}, {"draw": 1}, {"seed": 2}, {"seed": 1 + (1 << 32)}, {"offset": 1 << 34}):
        assert not torch.isclose(base, normals(64, **change)).any()


def test_antithetic_draws_come_in_pairs():
    first, second, third = (normals(64, draw=d, antithetic=True) for d in (0, 1, 2))
    assert torch.equal(first, -second)
    assert not torch.isclose(first.abs(), third.abs()).any()
