"""The Monte Carlo phase: who knows which sample of an update is due, when gradients overflow or are missing.

A linear loss has no curvature, and an antithetic pair tells so exactly: its statistic g * eps + g * (-eps) is zero.
"""

import copy

import pytest
import torch
from test_optimizer import assert_same, batch, make_model, values
from torch import nn

from distruction import BGD, Posterior, UsageError


def slopes(i, shapes):
    g = torch.Generator().manual_seed(i)
    return [torch.randn(shape, generator=g) for shape in shapes]


SHAPES = ((3, 5), (7,), ())


def linear(**options):
    params = [(f"p{i}", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(SHAPES)]
    options = {"std_init": 0.1, "max_std": float("inf"), "data_per_step": 10.0, **options}
    return BGD(params, **options)


def take(opt, step, i, *, overflow=False):
    """One call with the gradient of a linear loss, handed over as GradScaler does."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for p, slope in zip(params, slopes(i, [p.shape for p in params]), strict=True):
        p.grad = torch.full_like(p, float("inf")) if overflow else 4.0 * slope
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor([float(overflow)])
    step()
    del opt.grad_scale, opt.found_inf


def updates(opt, step, mc_samples, overflows, count=50):
    """``count`` updates; before the call numbers in ``overflows`` one that overflows."""
    for i in range(count * mc_samples):
        if i in overflows:
            take(opt, step, 999, overflow=True)
        take(opt, step, i // mc_samples)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize(
    ("compiled", "mc_samples", "overflows"),
    [*((False, k, at) for k in (2, 3) for at in ((0,), (1,), (5, 10, 11))), (True, 2, (0, 5)), (True, 3, (1, 10, 11))],
    ids=str,
)
def test_an_overflowed_call_might_as_well_never_have_been(compiled, with_prior, mc_samples, overflows):
    runs = []
    for at in ((), overflows):
        torch._dynamo.reset()
        opt = linear(mc_samples=mc_samples)
        if with_prior:
            opt = linear(mc_samples=mc_samples, prior=opt.posterior(), kl_weight=0.1)
        opt.train()
        step = torch.compile(opt.step, fullgraph=True, backend="eager") if compiled else opt.step
        updates(opt, step, mc_samples, at, count=50 if not compiled else 8)
        sample = [p.detach().clone() for p in opt.param_groups[0]["params"]]
        runs.append([*sample, *values(opt), *([opt.kl] if with_prior else [])])
        progress = opt.state_dict()["param_groups"][0]
        assert [progress[k] for k in ("calls", "accumulated")] == [0, 0]
        assert progress["draw"] == (50 if not compiled else 8) * mc_samples
    assert_same(*runs)


def test_std_stays_where_there_is_no_curvature_whatever_overflows():
    opt = linear(mc_samples=2)
    opt.train()
    updates(opt, opt.step, 2, (0, 7), count=200)
    change = torch.cat([s.div(0.1).log().abs().flatten() for s in opt.posterior().stds.values()])
    assert change.mean() < 1e-5


def test_pairs_hold_after_overflows_of_a_real_scaler():
    runs = []
    for at in ((), (0, 3)):
        model = make_model()
        opt = BGD(model.named_parameters(), std_init=0.1, data_per_step=16, mc_samples=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        model.eval()
        opt.train()
        for i in range(20):
            for overflow in (True, False) if i in at else (False,):
                opt.zero_grad()
                x, y = batch(i // 2)
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                if overflow:
                    model[0].weight.grad[0, 0] = float("nan")
                scaler.step(opt)
                scaler.update()
        runs.append(values(opt))
    assert_same(*runs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_resuming_after_an_overflow_goes_on_with_the_pair(compiled, after):
    torch._dynamo.reset()
    first, second, whole = (linear(mc_samples=2) for _ in range(3))
    for opt in (first, whole):
        opt.train()
    for i in range(8):
        take(whole, whole.step, i)
    step = torch.compile(first.step, fullgraph=True, backend="eager") if compiled else first.step
    take(first, step, 999, overflow=True)
    for i in range(after):
        take(first, step, i)
    take(first, step, 999, overflow=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for i in range(after, 8):
        take(second, second.step, i)
    assert_same(values(whole), values(second))


def test_a_closure_completes_the_update_that_an_overflow_left_unfinished():
    torch._dynamo.reset()
    opt = linear(mc_samples=2)
    opt.train()
    step = torch.compile(opt.step, fullgraph=True, backend="eager")
    take(opt, step, 0, overflow=True)
    take(opt, step, 0)
    calls = []
    opt.step(lambda: calls.append(1))
    assert len(calls) == 1
    assert opt.state_dict()["param_groups"][0]["draw"] == 2


def test_every_call_counts_for_every_group():
    """A group without gradients in a call, and one whose layer is unused for a while, keep step with the others."""
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    opt = BGD([{"params": [a]}, {"params": [b]}], std_init=0.1, max_std=float("inf"), mc_samples=2, data_per_step=10.0)
    opt.train()
    for i in range(20):
        opt.zero_grad()
        a.grad = torch.ones(4)
        if i > 2:
            b.grad = torch.ones(4)
        opt.step()
        if i == 3:
            before = opt.state[b]["std"].clone()
    groups = opt.state_dict()["param_groups"]
    assert [g["draw"] for g in groups] == [20, 20]
    # Its pairs hold from the first update on that has two of its gradients.
    torch.testing.assert_close(opt.state[b]["std"], before, rtol=1e-6, atol=0)
    torch.testing.assert_close(opt.state[a]["std"], torch.full((4,), 0.1), rtol=1e-6, atol=0)


def test_a_call_without_any_gradient_is_no_sample():
    opt = linear(mc_samples=2)
    opt.train()
    held = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    opt.step()
    assert_same(held, [p.detach() for p in opt.param_groups[0]["params"]])
    assert opt.state_dict()["param_groups"][0]["calls"] == 0


def test_a_group_cannot_join_in_the_middle_of_an_update():
    opt = linear(mc_samples=2)
    opt.train()
    take(opt, opt.step, 0)
    late = nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match="1 of 2 samples of an update are taken"):
        opt.add_param_group({"params": [("late", late)]})
    assert len(opt.param_groups) == 1
    take(opt, opt.step, 0)
    opt.add_param_group({"params": [("late", late)]})
    assert late.detach().any()


def test_a_state_of_two_minds_is_read_by_its_statistics():
    """States of an older version may say that a call was taken which had overflowed."""
    opt, whole = linear(mc_samples=2), linear(mc_samples=2)
    for o in (opt, whole):
        o.train()
        take(o, o.step, 0)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["calls"] = 0
    again = linear(mc_samples=2)
    again.load_state_dict(saved)
    for o in (again, whole):
        take(o, o.step, 0)
    assert_same(values(again), values(whole))


# --- parameters that come and go ---------------------------------------------------------------------------


def test_frozen_parameters_are_never_written():
    model = make_model()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    opt = BGD(model[3].named_parameters(prefix="3"), data_per_step=16)
    opt.train()
    opt.add_param_group({"params": list(model[0].named_parameters(prefix="0"))})
    assert torch.equal(model[0].weight, frozen)
    assert set(opt.posterior()) == {"3.weight", "3.bias", "0.bias"}
    opt.eval()
    model[3].bias.requires_grad_(False)  # frozen later, while it holds its mean
    bias = model[3].bias.detach().clone()
    model.eval()
    opt.train()
    for i in range(4):
        opt.zero_grad()
        nn.functional.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
        opt.step()
        assert torch.equal(model[3].bias, bias)
        assert torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_one_frozen_while_it_holds_a_sample_stays_until_eval_puts_its_mean_in(mc_samples):
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    opt = BGD([("a", a), ("b", b)], mc_samples=mc_samples)
    opt.train()
    b.requires_grad_(False)
    held = b.detach().clone()
    b.grad = torch.ones(4)  # a gradient that is left over
    for _ in range(2 * mc_samples):
        a.grad = torch.ones(4)
        opt.step()
        assert torch.equal(b, held)
    opt.eval()
    assert torch.equal(b, torch.ones(4))
    opt.train()
    assert torch.equal(b, torch.ones(4))


@pytest.mark.parametrize("mc_samples", [1, 2])
@pytest.mark.parametrize("when", range(4))
def test_one_unfrozen_waits_for_its_first_sample(mc_samples, when):
    """Its first gradient was taken at the value, not at a sample: the loss is linear, so std must not move."""
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4), requires_grad=False)
    opt = BGD([("a", a), ("b", b)], mc_samples=mc_samples, std_init=0.1, max_std=float("inf"), data_per_step=10.0)
    opt.train()
    for i in range(12):
        if i == when:
            b.requires_grad_(True)
        sampled = not torch.equal(b, torch.ones(4))
        before = None if not sampled else opt.state[b]["mean"].clone()
        a.grad, b.grad = torch.ones(4), torch.ones(4) if i >= when else None
        opt.step()
        if not sampled and b in opt.state:
            assert torch.equal(opt.state[b]["mean"], torch.ones(4))
            assert torch.equal(opt.state[b]["std"], torch.full((4,), 0.1))
        if sampled and mc_samples == 1:
            assert not torch.equal(opt.state[b]["mean"], before)
    if mc_samples == 2:
        torch.testing.assert_close(opt.state[b]["std"], torch.full((4,), 0.1), rtol=1e-6, atol=0)
    assert opt.state[b]["mean"].max() < 1


# --- the KL ------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.frozen = (nn.Linear(4, 4) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.used(x))


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("mc_samples", [1, 2])
def test_the_kl_is_that_of_the_posterior_whatever_gets_a_gradient(mc_samples, release):
    model = Branches()
    prior = Posterior({n: p.detach().clone() for n, p in model.named_parameters()},
                      {n: torch.full_like(p, 0.05) for n, p in model.named_parameters()})  # fmt: skip
    start = Posterior({n: m + 0.02 for n, m in prior.means.items()}, {n: 0.8 * s for n, s in prior.stds.items()})

    def of_posterior():
        q = opt.posterior()
        return q.kl(Posterior({n: prior.means[n] for n in q}, {n: prior.stds[n] for n in q})).item()

    opt = BGD(model.named_parameters(), std_init=start, prior=prior, kl_weight=0.3, mc_samples=mc_samples,
              release_gradients=release)  # fmt: skip
    opt.train()
    kls = []
    for i in range(6 * mc_samples):
        if i == 2 * mc_samples:
            model.frozen.bias.requires_grad_(True)
        if i == 4 * mc_samples:
            model.unused.bias.requires_grad_(False)
        opt.zero_grad()
        model(batch(i)[0]).square().mean().backward()
        opt.step()
        if (i + 1) % mc_samples == 0:
            assert opt.kl.item() == pytest.approx(of_posterior(), rel=1e-6)
            kls.append(opt.kl.item())
    assert kls[1] < kls[0]


def test_parameters_without_a_gradient_get_the_pull_in_closed_form():
    """w = lr * lambda * (std / std_p)**2: mean <- mean_p + (mean - mean_p) / (1 + w)."""
    used, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    names = ("used", "unused")
    prior = Posterior({n: torch.zeros(3) for n in names}, {n: torch.full((3,), 0.1) for n in names})
    start = Posterior({n: torch.ones(3) for n in names}, {n: torch.full((3,), 0.05) for n in names})
    opt = BGD(zip(names, (used, unused), strict=True), std_init=start, prior=prior, kl_weight=0.5, lr=1.0)
    opt.train()
    for _ in range(3):
        used.grad = torch.zeros(3)
        opt.step()
    for p in (used, unused):
        assert torch.equal(opt.state[p]["mean"], opt.state[used]["mean"])
    mean, std = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    for _ in range(3):
        a = 0.5 * 0.5 * ((std / 0.1) ** 2 - 1)
        mean = mean / (1 + 0.5 * (std / 0.1) ** 2)
        std = (std * torch.exp(-torch.asinh(a).clamp(-0.1, 0.1))).clamp(max=0.05)
    torch.testing.assert_close(opt.state[unused]["mean"], mean.float().expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(opt.state[unused]["std"], std.float().expand(3), rtol=1e-5, atol=0)
