"""``BGD(statistic="gauss-newton")``: 1/std**2 grows by data_per_step * g**2, whatever hands the gradients over."""

import copy
import math

import pytest
import torch
from test_optimizer import assert_same, batch, make_model, values
from torch import nn

from distruction import BGD, NonFiniteError, Posterior, UsageError

OPTIONS = {"statistic": "gauss-newton", "learn_mean": False, "std_init": 0.1, "data_per_step": 30.0}


def signed(model, x, y, i):
    """sum_n s_n loss_n / sqrt(batch)."""
    signs = 2.0 * torch.randint(2, (len(y),), generator=torch.Generator().manual_seed(i)) - 1.0
    return (signs * nn.functional.cross_entropy(model(x), y, reduction="none")).sum() / math.sqrt(len(y))


def run(steps, *, release=False, scaled=False, compiled=False, overflows=(), model=None, opt=None, noted=None):
    if model is None:
        model = make_model().eval()
        opt = BGD(model.named_parameters(), release_gradients=release, **OPTIONS)
    opt.train()
    torch._dynamo.reset()
    step = torch.compile(opt.step, fullgraph=True, backend="eager") if compiled else opt.step
    for i in steps:
        for overflow in (True, False) if i in overflows else (False,):
            opt.zero_grad()
            (signed(model, *batch(i), i) * (8.0 if scaled else 1.0)).backward()
            if scaled:
                if overflow:
                    model[0].weight.grad[0, 0] = math.inf
                opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor([float(overflow)])
            if noted is not None:
                noted.append([p.grad.double() for p in model.parameters()])
            step()
            if scaled:
                del opt.grad_scale, opt.found_inf
    return model, opt


def test_the_precision_grows_by_the_square():
    noted = []
    model, opt = run(range(25), noted=noted)
    start = [p.clone() for p in make_model().parameters()]
    for i, p in enumerate(model.parameters()):
        precision = 1 / 0.1**2 + 30.0 * sum(g[i] ** 2 for g in noted)
        torch.testing.assert_close(opt.state[p]["std"].double(), precision**-0.5, rtol=25 * 2e-7, atol=0)
        assert torch.equal(opt.state[p]["mean"], start[i])
        assert opt.state[p].keys() == {"mean", "std"}
        # The sample is that of the new std: the draws are standard normals.
        eps = (p.detach() - opt.state[p]["mean"]) / opt.state[p]["std"]
        assert eps.abs().max() < 6
    assert opt.state_dict()["param_groups"][0]["draw"] == 25
    assert (opt.state[model[3].weight]["std"] < 0.09).any()
    opt.eval()
    assert_same([p.detach() for p in model.parameters()], start)


@pytest.mark.parametrize(
    "how",
    [{"release": True}, {"scaled": True}, {"scaled": True, "overflows": (0, 3)}, {"compiled": True},
     {"compiled": True, "scaled": True, "overflows": (2,)}],
    ids=str,
)  # fmt: skip
def test_the_same_bits_however_the_gradients_come(how):
    (expected, _), (model, opt) = run(range(8)), run(range(8), **how)
    assert_same([p.detach() for p in expected.parameters()], [p.detach() for p in model.parameters()])
    assert opt.state_dict()["param_groups"][0]["draw"] == 8


def test_its_state_resumes_with_the_same_bits_and_is_no_other_statistics():
    whole, opt = run(range(8))
    _, half = run(range(3))
    again = make_model(seed=1).eval()
    opt_again = BGD(again.named_parameters(), **OPTIONS)
    opt_again.load_state_dict(copy.deepcopy(half.state_dict()))
    run(range(3, 8), model=again, opt=opt_again)
    assert_same(values(opt), values(opt_again))
    assert_same([p.detach() for p in whole.parameters()], [p.detach() for p in again.parameters()])

    plain = BGD(make_model().named_parameters(), learn_mean=False)
    for ours, theirs in ((plain, opt), (opt, plain)):
        before = values(ours)
        with pytest.raises(UsageError, match=r'the state is of statistic=".*" and the optimizer of statistic='):
            ours.load_state_dict(theirs.state_dict())
        assert_same(before, values(ours))
    older = copy.deepcopy(plain.state_dict())
    del older["param_groups"][0]["statistic"]
    plain.load_state_dict(older)
    with pytest.raises(UsageError, match='the state is of statistic="bgd"'):
        opt.load_state_dict(older)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_mean": True}, "needs learn_mean=False"),
        ({"mc_samples": 2}, "needs mc_samples=1"),
        ({"learn_std": False}, "needs learn_std=True"),
        ({"prior": Posterior.around(make_model(), 0.1), "kl_weight": 0.1}, "needs prior=None"),
        ({"statistic": "fisher"}, "statistic must be one of bgd, gauss-newton, not 'fisher'"),
    ],
)
def test_what_it_needs(options, message):
    with pytest.raises(UsageError, match=message):
        BGD(make_model().named_parameters(), **{**OPTIONS, **options})
    with pytest.raises(UsageError, match=r"needs learn_mean=False"):
        BGD([{"params": list(make_model().parameters()), "learn_mean": True}], **OPTIONS)


def test_a_refused_square_is_named_and_missing_gradients_count_nothing():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    opt = BGD([("a", a), ("b", b)], **OPTIONS)
    opt.train()
    held = b.detach().clone()
    a.grad = torch.ones(3)
    opt.step()
    assert not torch.equal(held, b)
    assert torch.equal(opt.state[b]["std"], torch.full((3,), 0.1))
    a.grad = torch.tensor([1.0, math.nan, 1.0])
    before = opt.state[a]["std"].clone()
    with pytest.raises(NonFiniteError, match=r"the gradient of a is NaN or infinite \(found after update 2\)"):
        opt.step()
    assert (opt.state[a]["std"] < before).tolist() == [True, False, True]
