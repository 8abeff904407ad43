"""Updates of one antithetic pair, which keep the first gradient alone; also where the second sample is another's.

A quadratic loss, and the update in closed form from the normals that its samples show.
"""

import copy
import math

import pytest
import torch
from torch import nn

from distruction import BGD, UsageError, ops
from distruction.ops.reference.philox import words_and_normals

N = 2000
FREE = {"max_log_std_step": math.inf, "max_mean_step": math.inf, "max_std": math.inf}


def make(**options):
    p = nn.Parameter(torch.zeros(N))
    return p, BGD([p], **{"std_init": 0.1, "mc_samples": 2, "data_per_step": 1.0, **FREE, **options})


def loss(p):
    return (10.0 * p.square() + p).sum()


class Follower:
    """The posterior that the observed samples lead to, in float64."""

    def __init__(self, p, opt):
        self.p, self.opt, self.taken = p, opt, []
        self.std = torch.full((N,), 0.1, dtype=torch.float64)
        self.mean = torch.zeros(N, dtype=torch.float64)

    def backward(self):
        self.opt.zero_grad()
        theta = self.p.detach().double().clone()
        loss(self.p).backward()
        self.taken.append((20.0 * theta + 1.0, (theta - self.mean) / self.std))

    def update(self):
        s1, s2 = (torch.stack(x).mean(0) for x in ([g for g, _ in self.taken], [g * e for g, e in self.taken]))
        self.mean = self.mean - self.std**2 * s1
        self.std = self.std * torch.exp(-torch.asinh(self.std * s2 / 2))
        self.taken = []

    def check(self):
        state = self.opt.state[self.p]
        torch.testing.assert_close(state["mean"].double(), self.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(state["std"].double(), self.std, rtol=1e-4, atol=0)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("predictions", [0, 1, 2])
def test_predictions_between_the_two_samples(predictions, release):
    p, opt = make(release_gradients=release)
    opt.train()
    follower = Follower(p, opt)
    for _ in range(3):
        follower.backward()
        opt.step()
        for _ in range(predictions):
            with opt.sampled_params():
                pass
        assert "m2" not in opt.state[p]
        with opt.sampled_params():
            follower.backward()
        opt.step()
        follower.update()
        assert "m2" not in opt.state[p]
    follower.check()


@pytest.mark.parametrize("odd", [False, True])
def test_an_update_that_begins_with_an_odd_draw_is_no_pair(odd):
    p, opt = make(mc_samples=1)
    opt.train()
    follower = Follower(p, opt)
    for _ in range(1 + (not odd)):
        follower.backward()
        opt.step()
        follower.update()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["mc_samples"] = 2
    opt.load_state_dict(saved)
    for _ in range(3):
        for _ in range(2):
            follower.backward()
            opt.step()
        follower.update()
    assert ("m2" in opt.state[p]) == odd
    follower.check()


@pytest.mark.parametrize("options", [{"mc_samples": 4}, {"antithetic": False}], ids=str)
def test_other_updates_keep_both_sums(options):
    p, opt = make(**options)
    opt.train()
    follower = Follower(p, opt)
    for _ in range(2):
        for _ in range(opt.param_groups[0]["mc_samples"]):
            follower.backward()
            opt.step()
        follower.update()
    assert "m2" in opt.state[p]
    follower.check()


def test_the_number_of_samples_may_change_between_updates():
    p, opt = make()
    opt.train()
    follower = Follower(p, opt)
    for samples in (2, 1, 2, 2, 4, 2):
        opt.param_groups[0]["mc_samples"] = samples
        for _ in range(samples):
            follower.backward()
            opt.step()
        follower.update()
    follower.check()


def test_a_state_with_both_sums_goes_on():
    """As versions before this one saved between the samples."""
    p, opt = make()
    opt.train()
    follower = Follower(p, opt)
    follower.backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    _, eps = words_and_normals(
        N,
        offset=0,
        stream=0,
        seed=saved["param_groups"][0]["seed"],
        draw=0,
        antithetic=True,
        device=torch.device("cpu"),
    )
    saved["state"][0]["m2"] = saved["state"][0]["m1"] * eps.float()
    opt.load_state_dict(saved)
    follower.backward()
    opt.step()
    follower.update()
    follower.check()
    assert "m2" not in opt.state[p]


def test_a_state_between_the_samples_is_refused_where_it_would_be_no_pair():
    p, opt = make()
    opt.train()
    loss(p).backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["antithetic"] = False
    before = opt.state[p]["m1"].clone()
    with pytest.raises(UsageError, match=r"between the samples of an antithetic pair.*antithetic=True"):
        opt.load_state_dict(saved)
    assert torch.equal(opt.state[p]["m1"], before)


def test_the_ops_refuse_a_pair_of_independent_draws():
    mean, counters = [torch.zeros(4)], torch.zeros(3, dtype=torch.int64)
    state, draws = ops.State(mean, [torch.ones(4)], m1=[torch.zeros(4)]), ops.Draws([0], [0], 1, counters)
    with pytest.raises(ValueError, match=r"m1 without m2 .* antithetic pair; pass m2, or antithetic=True"):
        ops.accumulate(mean, mean, state, draws)
    assert counters.tolist() == [0, 0, 0]


def conv(dtype=torch.float32, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, 32, 3, 3).to(dtype, memory_format=memory_format))
    opt = BGD([p], std_init=0.1, mc_samples=2)
    opt.train()
    return p, opt


def first_half(p, opt):
    opt.zero_grad()
    p.square().sum().backward()
    opt.step()


def drawn_anew(p, opt):
    """What a resumed run would hold."""
    other = nn.Parameter(p.detach().clone())
    again = BGD([other], mc_samples=2)
    again.load_state_dict(opt.state_dict())
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_second_sample_has_the_bits_that_a_resumed_run_draws(dtype, memory_format):
    p, opt = conv(dtype, memory_format)
    for _ in range(3):
        first_half(p, opt)
        assert torch.equal(p, drawn_anew(p, opt))
        with opt.sampled_params():
            pass
        assert torch.equal(p, drawn_anew(p, opt))


@pytest.mark.parametrize("between", ["nothing", "posterior", "backward"])
@pytest.mark.parametrize("release", [False, True])
def test_the_second_sample_after_somebody_else_wrote_to_the_first(between, release):
    model = nn.Linear(40, 40)
    opt = BGD(model.named_parameters(), std_init=0.1, mc_samples=2, release_gradients=release)
    opt.train()
    opt.zero_grad()
    x = torch.ones(3, 40)
    if between == "backward" and not release:
        model(x).sum().backward()
    with torch.no_grad():
        model.weight[3:7] = 5.0
    if between == "posterior":
        assert (opt.posterior().means["weight"][3:7] == 5.0).all()
        assert (model.weight[3:7] == 5.0).all()
    if between != "backward" or release:
        model(x).sum().backward()
    opt.step()
    held = model.weight.detach().clone()
    opt.train()
    assert torch.equal(held, model.weight)
    assert not (held[3:7] == 5.0).any()
    assert (opt.posterior().means["weight"][3:7] == 5.0).all()


def test_the_second_sample_after_the_first_changed_its_type():
    model = nn.Linear(40, 40).bfloat16()
    opt = BGD(model.parameters(), std_init=0.1, mc_samples=2)
    opt.train()
    model.float()
    model(torch.ones(3, 40)).sum().backward()
    opt.step()
    held = model.weight.detach().clone()
    opt.train()
    assert torch.equal(held, model.weight)


def test_the_second_sample_after_a_gradient_at_a_sample_in_eval_mode():
    p, opt = make()
    opt.eval()
    for _ in range(2):
        with opt.sampled_params():
            first = p.detach().clone()
            loss(p).backward()
        opt.step()
        assert torch.equal(p, opt.state[p]["mean"])
        with opt.sampled_params():
            torch.testing.assert_close(p.detach() - opt.state[p]["mean"], opt.state[p]["mean"] - first)
            opt.zero_grad()
            loss(p).backward()
        opt.step()
        opt.zero_grad()
