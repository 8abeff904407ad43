"""BGD as a ``torch.optim`` optimizer."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from distruction import BGD, NonFiniteError, Posterior, UsageError


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)


def train_steps(model, opt, steps):
    for i in steps:
        x, y = batch(i)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


def values(opt):
    return [t for p in opt.posterior().values() for t in p]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_modes_switch_between_sample_and_mean():
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    opt = BGD(model.named_parameters())
    opt.train()
    sample = [p.detach().clone() for p in model.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, sample, strict=True))
    opt.eval()
    assert_same(before, list(model.parameters()))
    opt.train()
    assert_same(sample, list(model.parameters()))


def test_loss_goes_to_that_of_the_maximum_likelihood():
    model = nn.Linear(3, 1)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([[1.0, -2.0, 0.5]])
    y = x @ weight.T + 0.3
    opt = BGD(model.named_parameters(), std_init=0.1, data_per_step=64)
    opt.train()
    for _ in range(400):
        opt.zero_grad()
        (0.5 * (model(x) - y).square().mean()).backward()
        opt.step()
    opt.eval()
    torch.testing.assert_close(model.weight.detach(), weight, atol=0.05, rtol=0)


def test_step_needs_a_sample():
    model = make_model()
    opt = BGD(model.parameters())
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(UsageError, match=r"call opt.train\(\)"):
        opt.step()


@pytest.mark.parametrize("mc_samples", [1, 2, 3])
def test_closure_equals_the_plain_loop(mc_samples):
    a, b = make_model(), make_model()
    opt_a, opt_b = (BGD(m.named_parameters(), mc_samples=mc_samples, data_per_step=16) for m in (a, b))
    opt_a.train()
    train_steps(a, opt_a, [i // mc_samples for i in range(4 * mc_samples)])
    opt_a.eval()
    for i in range(4):
        x, y = batch(i)

        def closure(x=x, y=y):
            opt_b.zero_grad()
            loss = nn.functional.cross_entropy(b(x), y)
            loss.backward()
            return loss

        assert isinstance(opt_b.step(closure), torch.Tensor)
    assert_same(values(opt_a), values(opt_b))
    assert_same(list(a.parameters()), list(b.parameters()))


def test_closure_that_raises_leaves_the_means():
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    opt = BGD(model.parameters())

    def closure():
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        opt.step(closure)
    assert_same(before, list(model.parameters()))


def test_sampled_params_in_a_plain_loop_equals_train_mode():
    a, b = make_model(), make_model()
    opt_a, opt_b = (BGD(m.named_parameters(), data_per_step=16) for m in (a, b))
    opt_a.train()
    train_steps(a, opt_a, range(3))
    opt_a.eval()
    for i in range(3):
        x, y = batch(i)
        opt_b.zero_grad()
        with opt_b.sampled_params():
            nn.functional.cross_entropy(b(x), y).backward()
        opt_b.step()
    assert_same(list(a.parameters()), list(b.parameters()))


@pytest.mark.parametrize("mc_samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(mc_samples, dtype):
    options = {"mc_samples": mc_samples, "data_per_step": 16}
    whole = make_model().to(dtype)
    opt = BGD(whole.named_parameters(), **options)
    opt.train()

    def steps(model, opt, which):
        for i in which:
            x, y = batch(i)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x.to(dtype)).float(), y).backward()
            opt.step()

    steps(whole, opt, range(4))
    saved = copy.deepcopy((whole.state_dict(), opt.state_dict()))
    steps(whole, opt, range(4, 9))

    again = make_model(seed=1).to(dtype)
    opt_again = BGD(again.named_parameters(), **options)
    again.load_state_dict(saved[0])
    opt_again.load_state_dict(saved[1])
    steps(again, opt_again, range(4, 9))
    assert_same(values(opt), values(opt_again))
    assert_same(list(whole.parameters()), list(again.parameters()))
    assert all(s["mean"].dtype == torch.float32 for s in opt_again.state.values())


def test_pickle_and_deepcopy():
    model = make_model()
    opt = BGD(model.named_parameters(), data_per_step=16)
    opt.train()
    train_steps(model, opt, range(2))
    model_b, opt_b = pickle.loads(pickle.dumps((model, opt)))
    model_c, opt_c = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (model_b, opt_b), (model_c, opt_c)):
        train_steps(m, o, range(2, 4))
    assert_same(values(opt), values(opt_b))
    assert_same(values(opt), values(opt_c))


def test_parameters_without_gradient_keep_their_posterior_and_are_redrawn():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    opt = BGD([*a.named_parameters(prefix="a"), *b.named_parameters(prefix="b")])
    opt.train()
    mean, sample = opt.posterior()["b.weight"][0], b.weight.detach().clone()
    a(torch.ones(2, 3)).sum().backward()
    opt.step()
    assert torch.equal(opt.posterior()["b.weight"][0], mean)
    assert not torch.equal(b.weight, sample)


def test_frozen_and_tied_parameters():
    model = make_model()
    model[3].weight.requires_grad_(False)
    frozen = model[3].weight.detach().clone()
    twin = nn.Linear(4, 8)
    twin.weight = model[0].weight
    both = nn.ModuleDict({"model": model, "twin": twin})
    opt = BGD(both.named_parameters(), data_per_step=16)
    opt.train()
    train_steps(model, opt, range(2))
    assert torch.equal(model[3].weight, frozen)
    assert twin.weight is model[0].weight
    assert "model.3.weight" not in opt.posterior()
    assert "twin.weight" not in opt.posterior()


def test_channels_last_parameters():
    models = [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    for m in models:
        opt = BGD(m.parameters(), data_per_step=4)
        opt.train()
        for i in range(3):
            opt.zero_grad()
            m(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            opt.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, atol=1e-5, rtol=1e-4)


def test_groups_have_their_own_options_and_streams():
    model = make_model()
    opt = BGD([{"params": list(model[0].named_parameters()), "learn_mean": False}], data_per_step=16)
    opt.add_param_group({"params": list(model[3].named_parameters()), "lr": 0.5})
    assert [g["first_stream"] for g in opt.param_groups] == [0, 2]
    before = [p.detach().clone() for p in model.parameters()]
    opt.train()
    train_steps(model, opt, range(2))
    opt.eval()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    # Linear with fixed means, BatchNorm outside of the optimizer, Linear with learnt means.
    assert changed == [False, False, False, False, True, True]


def test_schedulers_change_lr():
    model = make_model()
    opt = BGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    opt.train()
    train_steps(model, opt, range(1))
    schedule.step()
    assert opt.param_groups[0]["lr"] < 1


def test_maximize_is_the_negated_loss():
    models = [make_model(), make_model()]
    for m, sign, maximize in zip(models, (1, -1), (False, True), strict=True):
        opt = BGD(m.parameters(), maximize=maximize, data_per_step=16)
        opt.train()
        for i in range(3):
            x, y = batch(i)
            opt.zero_grad()
            (sign * nn.functional.cross_entropy(m(x), y)).backward()
            opt.step()
    assert_same(*(list(m.parameters()) for m in models))


def test_prior_pulls_back_and_kl_is_reported():
    model = make_model()
    prior = Posterior.around(model, 0.05)
    opt = BGD(model.named_parameters(), std_init=prior, prior=prior, kl_weight=0.5, data_per_step=16)
    opt.train()
    train_steps(model, opt, range(3))
    opt.eval()
    assert opt.kl.item() == pytest.approx(opt.posterior().kl(prior).item(), rel=1e-6)
    assert opt.kl > 0
    for group in opt.param_groups:
        group["kl_weight"] = 1.0
    opt.train()
    for i in range(200):
        train_steps(model, opt, [i])
    assert opt.kl < 1e-3


def test_nan_gradient_is_refused_by_name():
    model = make_model()
    opt = BGD(model.named_parameters())
    opt.train()
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    model[3].weight.grad[0, 0] = math.nan
    mean = opt.posterior()["3.weight"][0]
    with pytest.raises(NonFiniteError, match=r"the gradient of 3.weight is NaN"):
        opt.step()
    assert opt.posterior()["3.weight"][0][0, 0] == mean[0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std_init": 0}, "std_init must be > 0 and finite, not 0"),
        ({"std_init": -1.0}, "std_init must be > 0"),
        ({"std_init": math.nan}, "std_init must be > 0"),
        ({"lr": -1}, "lr must be >= 0 and finite, not -1"),
        ({"kl_weight": 1.5}, r"kl_weight \(lambda\) must be in \[0, 1\], not 1.5"),
        ({"mc_samples": 0}, "mc_samples must be an integer >= 1, not 0"),
        ({"data_per_step": 0}, "data_per_step must be > 0, not 0"),
        ({"max_std": 0}, "max_std must be > 0, not 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        BGD(make_model().parameters(), **options)


def test_names_are_asked_for():
    model = make_model()
    prior = Posterior.around(model, 0.05)
    with pytest.raises(UsageError, match=r"pass model.named_parameters\(\)"):
        BGD(model.parameters(), prior=prior)
    with pytest.raises(UsageError, match=r"pass model.named_parameters\(\)"):
        BGD(model.parameters()).posterior()
    with pytest.raises(UsageError, match="prior has no parameter"):
        BGD(nn.Linear(2, 2).named_parameters(), prior=prior)


def test_sparse_and_complex_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = BGD(embedding.named_parameters())
    opt.train()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="gradient of weight is sparse"):
        opt.step()
    with pytest.raises(UsageError, match="complex"):
        BGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
