"""The registered ops: opcheck, their argument errors, dispatch."""

import math
import re

import pytest
import torch

from distruction import ops
from distruction.errors import UsageError
from distruction.ops import backends

SHAPES = [(5,), (3, 7), (64,), (1,)]


def lists(n, dtype=torch.float32, low=-1.0):
    g = torch.Generator().manual_seed(n)
    return [low + (1 - low) * torch.rand(s, generator=g).to(dtype) for s in SHAPES]


def generator(counters=None, streams=(0, 1, 2, 3)):
    counters = torch.zeros(3, dtype=torch.int64) if counters is None else counters
    return [0] * len(SHAPES), list(streams), 7, counters, True, False


def step_arguments(m1=(), m2=(), prior=True):
    priors = (lists(5), lists(6, low=0.1)) if prior else ([], [])
    scalars = (torch.tensor(1.0), torch.tensor(0.1), 10.0)
    return (
        *(lists(1), lists(2), lists(3, low=0.1), lists(4), list(m1), list(m2), *priors, *scalars),
        *(*generator(), 0.1, 0.1, 0.05, True, True),
    )


def gauss_newton_arguments(evidence=10.0):
    return lists(1), lists(3, low=0.1), lists(4), lists(2), evidence, *generator()


def test_empty_lists_are_a_rank_without_elements():
    counters = torch.zeros(3, dtype=torch.int64)
    rest = ([], [], 7, counters, True, False)
    ops.sample([], [], [], *rest)
    ops.accumulate([], [], [], [], [], [], *rest)
    ops.gauss_newton([], [], [], [], 1.0, *rest)
    lr, kl_weight = torch.tensor(1.0), torch.tensor(0.1)
    kl = ops.step(*([[]] * 8), lr, kl_weight, 1.0, *rest, 0.1, 0.1, 0.05, True, True)
    assert kl == 0
    assert counters.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("sample", (lists(1), lists(2), lists(3, low=0.1), *generator())),
        ("accumulate", (*(lists(i) for i in range(5)), lists(5, low=0.1), *generator())),
        ("gauss_newton", gauss_newton_arguments()),
        ("step", step_arguments()),
        ("step", step_arguments(lists(8), lists(9), prior=False)),
    ],
)
def test_opcheck(op, args):
    torch.library.opcheck(getattr(torch.ops.distruction, op).default, args)


def test_lists_must_agree():
    with pytest.raises(ValueError, match=r"out has 3 tensors, mean has 4"):
        ops.sample(lists(1)[:3], lists(2), lists(3), *generator())
    swapped = lists(3)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    with pytest.raises(ValueError, match=r"std\[1\] is \(64,\).*mean\[1\] is \(3, 7\)"):
        ops.sample(lists(1), lists(2), swapped, *generator())
    with pytest.raises(ValueError, match="one entry per tensor"):
        ops.sample(lists(1), lists(2), lists(3), *generator(streams=[0]))
    with pytest.raises(ValueError, match=r"counters must be int64 of shape \(3,\)"):
        ops.sample(lists(1), lists(2), lists(3), *generator(counters=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"mean\[0\] is torch.bfloat16; state is float32"):
        ops.sample(lists(1), lists(2, torch.bfloat16), lists(3, torch.bfloat16), *generator())


@pytest.mark.parametrize("evidence", [-1.0, math.nan, math.inf, 1e39])
def test_evidence_is_a_number_of_data_points(evidence):
    arguments = gauss_newton_arguments(evidence)
    before = [t.clone() for group in arguments[:2] for t in group]
    with pytest.raises(UsageError, match=rf"evidence is {re.escape(str(evidence))}.*at least 0"):
        ops.gauss_newton(*arguments)
    for a, b in zip(before, [t for group in arguments[:2] for t in group], strict=True):
        assert torch.equal(a, b)


def test_found_inf_changes_nothing_and_scale_is_divided_out():
    plain, scaled, skipped = step_arguments(), step_arguments(), step_arguments()
    before = [t.clone() for group in (skipped[0], skipped[1], skipped[2]) for t in group]
    scaled = (*scaled[:3], [g * 1024 for g in scaled[3]], *scaled[4:])
    ops.step(*plain, backend="reference")
    ops.step(*scaled, torch.tensor(1024.0), torch.tensor(0.0), backend="reference")
    ops.step(*skipped, torch.tensor(1024.0), torch.tensor(1.0), backend="reference")
    for a, b in zip(plain[1], scaled[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(before, [t for group in skipped[:3] for t in group], strict=True):
        assert torch.equal(a, b)
    assert skipped[14].tolist() == [0, 0, 0]


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="backend 'fast' is unknown; choose auto, reference"):
        ops.resolve("fast", "cpu")


def test_explicit_backend_that_cannot_serve_says_so():
    with pytest.raises(ops.BackendUnavailable, match="'cuda' cannot serve 'cpu' tensors"):
        ops.resolve("cuda", "cpu")


def test_environment_replaces_auto(monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT, "reference")
    assert ops.resolve("auto", "cpu").__name__ == backends.MODULES["reference"]


def test_stochastic_rounding_is_unbiased():
    n = 200_000
    mean, std = torch.full((n,), 1.0 + 2**-10), torch.full((n,), 1e-6)
    out = torch.empty(n, dtype=torch.bfloat16)
    counters = torch.zeros(3, dtype=torch.int64)
    ops.sample([out], [mean], [std], [0], [0], 3, counters, False, True, "reference")
    # bfloat16 has neighbours 1 and 1 + 2**-7 here: an eighth of the stores must go up.
    up = (out == 1 + 2**-7).double().mean().item()
    assert set(out.float().unique().tolist()) <= {1.0, 1 + 2**-7}
    assert abs(up - 0.125) < 4.5 * (0.125 * 0.875 / n) ** 0.5
