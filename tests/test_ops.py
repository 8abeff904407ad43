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


def draws(counters=None, streams=(0, 1, 2, 3)):
    counters = torch.zeros(3, dtype=torch.int64) if counters is None else counters
    return ops.Draws([0] * len(SHAPES), list(streams), 7, counters, antithetic=True)


def rule():
    return ops.Rule(torch.tensor(1.0), torch.tensor(0.1), 10.0, 0.1, 0.1, 0.05)


def state(prior=False, statistics=False):
    priors = {"prior_mean": lists(5), "prior_std": lists(6, low=0.1)} if prior else {}
    sums = {"m1": lists(8), "m2": lists(9)} if statistics else {}
    return ops.State(lists(2), lists(3, low=0.1), **priors, **sums)


def flat(op, *parts, **others):
    """The arguments of a registered op, by the names in its schema."""
    given = {**others, **{name: value for part in parts for name, value in vars(part).items()}}
    arguments = op.default._schema.arguments
    return tuple(given[a.name] for a in arguments if a.name in given)


def test_empty_lists_are_a_rank_without_elements():
    counters = torch.zeros(3, dtype=torch.int64)
    nothing = (ops.State([], []), ops.Draws([], [], 7, counters, antithetic=True))
    ops.sample([], *nothing)
    ops.accumulate([], [], *nothing)
    ops.gauss_newton([], [], *nothing, 1.0)
    assert ops.step([], [], *nothing, rule()) == 0
    assert counters.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("sample", (state(), draws())),
        ("accumulate", (state(statistics=True), draws())),
        ("gauss_newton", (state(), draws())),
        ("step", (state(prior=True), draws(), rule())),
        ("step", (state(statistics=True), draws(), rule())),
    ],
)
def test_opcheck(op, args):
    op = getattr(torch.ops.distruction, op)
    arguments = flat(op, *args, out=lists(1), param=lists(1), grad=lists(4), evidence=10.0)
    assert sum(len(a) == len(SHAPES) for a in arguments if isinstance(a, list)) >= 3
    torch.library.opcheck(op.default, arguments)


def test_lists_must_agree():
    with pytest.raises(ValueError, match=r"out has 3 tensors, mean has 4"):
        ops.sample(lists(1)[:3], state(), draws())
    swapped = lists(3)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    with pytest.raises(ValueError, match=r"std\[1\] is \(64,\).*mean\[1\] is \(3, 7\)"):
        ops.sample(lists(1), ops.State(lists(2), swapped), draws())
    with pytest.raises(ValueError, match="one entry per tensor"):
        ops.sample(lists(1), state(), draws(streams=[0]))
    with pytest.raises(ValueError, match=r"counters must be int64 of shape \(3,\)"):
        ops.sample(lists(1), state(), draws(counters=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"mean\[0\] is torch.bfloat16; state is float32"):
        ops.sample(lists(1), ops.State(lists(2, torch.bfloat16), lists(3, torch.bfloat16)), draws())


@pytest.mark.parametrize("evidence", [-1.0, math.nan, math.inf, 1e39])
def test_evidence_is_a_number_of_data_points(evidence):
    param, posterior = lists(1), state()
    before = [t.clone() for t in [*param, *posterior.std]]
    with pytest.raises(UsageError, match=rf"evidence is {re.escape(str(evidence))}.*at least 0"):
        ops.gauss_newton(param, lists(4), posterior, draws(), evidence)
    for a, b in zip(before, [*param, *posterior.std], strict=True):
        assert torch.equal(a, b)


def test_found_inf_changes_nothing_and_scale_is_divided_out():
    plain, scaled, skipped = ((lists(1), state(prior=True), draws()) for _ in range(3))
    before = [t.clone() for t in [*skipped[0], *skipped[1].mean, *skipped[1].std]]

    def run(model, scale, *amp):
        param, posterior, drawn = model
        grad = [scale * g for g in lists(4)]
        ops.step(param, grad, posterior, drawn, rule(), ops.Amp(*map(torch.tensor, amp)), backend="reference")

    run(plain, 1)
    run(scaled, 1024, 1024.0, 0.0)
    run(skipped, 1, 1024.0, 1.0)
    for a, b in zip(plain[1].mean, scaled[1].mean, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(before, [*skipped[0], *skipped[1].mean, *skipped[1].std], strict=True):
        assert torch.equal(a, b)
    assert skipped[2].counters.tolist() == [0, 0, 0]


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
    drawn = ops.Draws([0], [0], 3, counters, stochastic_rounding=True)
    ops.sample([out], ops.State([mean], [std]), drawn, backend="reference")
    # bfloat16 has neighbours 1 and 1 + 2**-7 here: an eighth of the stores must go up.
    up = (out == 1 + 2**-7).double().mean().item()
    assert set(out.float().unique().tolist()) <= {1.0, 1 + 2**-7}
    assert abs(up - 0.125) < 4.5 * (0.125 * 0.875 / n) ** 0.5
