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
        BGD(model.parameters(), prior=prior, kl_weight=0.1)
    with pytest.raises(UsageError, match=r"pass model.named_parameters\(\)"):
        BGD(model.parameters()).posterior()
    with pytest.raises(UsageError, match="prior has no parameter"):
        BGD(nn.Linear(2, 2).named_parameters(), prior=prior, kl_weight=0.1)


def test_sparse_and_complex_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = BGD(embedding.named_parameters())
    opt.train()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="gradient of weight is sparse"):
        opt.step()
    with pytest.raises(UsageError, match="complex"):
        BGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"learning_rate": 1.0}, "BGD has no option 'learning_rate'"),
        ({"prior": None}, "prior is one for all groups"),
        ({"statistic": "gauss-newton"}, "statistic is one for all groups"),
        ({"mc_samples": 1.5}, "mc_samples must be an integer >= 1, not 1.5"),
        ({"std_init": 0}, "std_init must be > 0 and finite, not 0"),
        ({"max_log_std_step": math.nan}, "max_log_std_step must be > 0, not nan"),
        ({"kl_weight": 0.5}, "kl_weight needs prior="),
        ({"seed": 2**64}, "seed must be an integer of 64 bits"),
        ({"seed": 0.5}, "seed must be an integer of 64 bits"),
        ({"learn_mean": "no"}, "learn_mean must be True or False, not 'no'"),
        ({"backend": "tritn"}, "backend must be one of .*triton.*, not 'tritn'"),
    ],
)
def test_options_of_a_group_are_checked_like_the_constructors(group, message):
    params = list(nn.Linear(2, 2).parameters())
    with pytest.raises(UsageError, match=message):
        BGD([{"params": params, **group}])
    opt = BGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(UsageError, match=message):
        opt.add_param_group({"params": params, **group})
    assert len(opt.param_groups) == 1
    opt.train()
    opt.eval()
    opt.add_param_group({"params": params})
    if group.keys() <= {"std_init", "max_log_std_step", "kl_weight", "seed", "learn_mean", "backend"}:
        with pytest.raises(UsageError, match=message):
            BGD(params, **group)


def test_a_group_may_have_its_own_std_init():
    a, b, c = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    given = Posterior({"c": torch.ones(3)}, {"c": torch.full((3,), 0.3)})
    groups = [
        {"params": [("a", a)]},
        {"params": [("b", b)], "std_init": 0.2},
        {"params": [("c", c)], "std_init": given},
    ]
    opt = BGD(groups, std_init=0.1)
    opt.train()
    assert [float(opt.state[p]["std"][0]) for p in (a, b, c)] == pytest.approx([0.1, 0.2, 0.3])
    assert [g["max_std"] for g in opt.param_groups] == pytest.approx([0.1, 0.2, 0.3])
    assert opt.state[c]["mean"].tolist() == [1, 1, 1]
    pickle.loads(pickle.dumps(opt)).state_dict()


def test_a_prior_and_its_weight_come_together():
    model = make_model()
    prior = Posterior.around(model, 0.05)
    with pytest.raises(UsageError, match="prior needs kl_weight="):
        BGD(model.named_parameters(), prior=prior)
    for weight in (0.5, torch.tensor(0.5)):
        with pytest.raises(UsageError, match="kl_weight needs prior="):
            BGD(model.named_parameters(), kl_weight=weight)
    BGD(model.named_parameters(), kl_weight=0.0)
    opt = BGD(model.named_parameters(), prior=prior, kl_weight=0.0)  # a schedule may raise it
    opt.train()
    train_steps(model, opt, range(1))
    assert opt.kl > 0
    BGD([{"params": list(model.named_parameters()), "kl_weight": 0.1}], prior=prior)


def test_annotations_of_schedulers_and_factories_are_no_options():
    params = list(nn.Linear(2, 2).parameters())
    BGD([{"params": params, "lr_scale": 0.5, "initial_lr": 1.0, "weight_decay": 0.0, "name": "body"}])


def test_one_group_is_on_one_device():
    here, there = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))
    with pytest.raises(UsageError, match=r"a group's parameters are on one device, and .* on cpu, .* on meta"):
        BGD([("here", here), ("there", there)])
    opt = BGD([{"params": [("here", here)]}, {"params": [("there", there)]}])
    assert len(opt.param_groups) == 2
    with pytest.raises(UsageError, match="one device"):
        opt.add_param_group({"params": [("a", nn.Parameter(torch.zeros(1))), ("b", nn.Parameter(there.detach()))]})


def test_a_model_that_was_moved_is_told():
    model = nn.Linear(2, 2)
    opt = BGD(model.named_parameters())
    opt.train()
    opt.eval()
    # No two devices with data are at hand: the state moves, instead of the model.
    opt.state[model.weight] = {k: t.to("meta") for k, t in opt.state[model.weight].items()}
    with pytest.raises(UsageError, match="weight is on cpu and its mean and std on meta"):
        opt.train()


# --- what is written to the parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_in_eval_mode_become_the_means(dtype):
    model, other = make_model().to(dtype), make_model(seed=1).to(dtype)
    opt = BGD(model.named_parameters(), data_per_step=16)
    opt.train()
    opt.eval()
    model.load_state_dict(other.state_dict())
    opt.train()
    assert not torch.equal(model[0].weight, other[0].weight)
    opt.eval()
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
    assert torch.equal(opt.posterior().means["0.weight"], other[0].weight.float())


def test_weights_loaded_in_eval_mode_are_seen_by_everything():
    for use in ("posterior", "state_dict", "sampled_params", "closure", "eval"):
        model, other = make_model(), make_model(seed=1)
        opt = BGD(model.named_parameters(), data_per_step=16, lr=0.0)
        opt.train()
        opt.eval()
        with torch.no_grad():
            model[0].weight[0, 0] = 7.0  # any write
        model[3].load_state_dict(other[3].state_dict())
        if use == "posterior":
            assert opt.posterior().means["0.weight"][0, 0] == 7
        elif use == "state_dict":
            assert opt.state_dict()["state"][0]["mean"][0, 0] == 7
        elif use == "sampled_params":
            with opt.sampled_params():
                pass
        elif use == "closure":
            opt.step(lambda model=model: model(batch(0)[0]).sum().backward())
        opt.eval()
        assert model[0].weight[0, 0] == 7
        assert torch.equal(model[3].weight, other[3].weight)


def test_a_bfloat16_model_keeps_the_digits_of_what_was_not_written():
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    exact = torch.tensor([1.001, 2.002, 3.003, 4.004])
    opt = BGD([("p", p)], std_init=Posterior({"p": exact}, {"p": torch.ones(4)}))
    opt.train()
    opt.eval()
    with torch.no_grad():
        p[2] = 9.0
    opt.train()
    assert torch.equal(opt.posterior().means["p"], torch.tensor([1.001, 2.002, 9.0, 4.004]))


def test_what_is_written_over_a_sample_is_not_lost():
    """The best checkpoint loaded at the end, without a thought for modes."""
    model, best = make_model(), make_model(seed=1)
    opt = BGD(model.named_parameters(), data_per_step=16)
    opt.train()
    train_steps(model, opt, range(2))
    model.load_state_dict(best.state_dict())
    opt.eval()
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in best.parameters()])
    # A projection after each step, as of a clipped weight.
    opt = BGD(model.named_parameters(), data_per_step=16)
    opt.train()
    for i in range(3):
        train_steps(model, opt, [i])
        with torch.no_grad():
            low = model[3].bias < 0.25
            model[3].bias.clamp_(min=0.25)
    opt.eval()
    assert low.any()
    assert (model[3].bias[low] == 0.25).all()
    assert (model[3].bias[~low] != 0.25).all()


def test_nan_that_is_written_is_refused():
    model = make_model()
    opt = BGD(model.named_parameters())
    opt.train()
    opt.eval()
    before = opt.posterior()["3.bias"][0]
    with torch.no_grad():
        model[3].bias[1] = math.nan
    with pytest.raises(NonFiniteError, match=r"NaN or infinity was written to 3.bias"):
        opt.train()
    assert torch.equal(opt.state[model[3].bias]["mean"], before)
    with torch.no_grad():
        model[3].bias[1] = 0.5
    opt.train()
    assert opt.posterior()["3.bias"][0][1] == 0.5


# --- samples for prediction -------------------------------------------------------------------------------------


def sampled(model, opt, count):
    found = []
    for _ in range(count):
        with opt.sampled_params(), torch.no_grad():
            found.append(torch.cat([p.flatten() for p in model.parameters()]).clone())
    return found


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_predictions_see_a_sample_each_and_training_none_of_it(mode):
    runs = []
    for predictions in (0, 3):
        model = make_model()
        opt = BGD(model.named_parameters(), std_init=0.1, data_per_step=16, mc_samples=2)
        for i in range(6):
            opt.train()
            train_steps(model, opt, [i])
            if mode == "eval":
                opt.eval()
            held = [p.detach().clone() for p in model.parameters()]
            found = sampled(model, opt, predictions)
            assert len({tuple(f.tolist()) for f in found}) == predictions
            assert_same(held, [p.detach() for p in model.parameters()])
        runs.append(values(opt))
    assert_same(*runs)


def test_samples_for_prediction_have_the_posteriors_moments():
    p = nn.Parameter(torch.full((500,), 3.0))
    opt = BGD([p], std_init=0.5)
    drawn = torch.stack([s for s in sampled(nn.ParameterList([p]), opt, 200)])
    eps = (drawn - 3.0) / 0.5
    # 100,000 standard normals: mean within 5 / sqrt(n), variance within 5 * sqrt(2 / n).
    assert abs(eps.mean()) < 5 / math.sqrt(eps.numel())
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / eps.numel())
    correlation = torch.corrcoef(eps)
    assert (correlation - torch.eye(200)).abs().max() < 6 / math.sqrt(500)


def test_predicting_alone_makes_no_step_acceptable():
    model = make_model()
    opt = BGD(model.named_parameters())
    sampled(model, opt, 2)
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(UsageError, match=r"call opt.train\(\)"):
        opt.step()
    # Nor does a backward pass at a sample whose gradients were dropped.
    with opt.sampled_params():
        nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    opt.zero_grad()
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(UsageError, match=r"call opt.train\(\)"):
        opt.step()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_taken_after_predictions_are_paired_with_the_sample_they_were_taken_at(mode):
    """A quadratic loss: E[g * eps] is its curvature only if eps is the one that the gradient was taken at."""
    p = nn.Parameter(torch.zeros(2000))
    opt = BGD([p], std_init=0.1, mc_samples=2, data_per_step=1.0, max_log_std_step=math.inf, max_mean_step=math.inf)
    if mode == "train":
        opt.train()
    std = torch.full((2000,), 0.1, dtype=torch.float64)
    for _ in range(3):
        sampled(nn.ParameterList([p]), opt, 2)
        s2 = torch.zeros(2000, dtype=torch.float64)
        mean = opt.state[p]["mean"].double()
        for _ in range(2):
            opt.zero_grad()
            with opt.sampled_params():
                eps = (p.detach().double() - mean) / std
                (10.0 * p.square()).sum().backward()
                s2 += p.grad.double() * eps / 2
            opt.step()
        std = (std * torch.exp(-torch.asinh(std * s2 / 2))).clamp(max=0.1)
    torch.testing.assert_close(opt.state[p]["std"].double(), std, rtol=1e-4, atol=0)


def test_streams_of_two_optimizers():
    """Draws go by seed and position: a seed, or streams, of its own makes a second optimizer independent."""

    def eps(**options):
        p = nn.Parameter(torch.zeros(1000))
        opt = BGD([{"params": [p], **options}], std_init=1.0, seed=3)
        opt.train()
        return p.detach()

    first = eps()
    assert torch.equal(first, eps())
    for other in (eps(seed=4), eps(first_stream=1)):
        assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 5 / math.sqrt(1000)
