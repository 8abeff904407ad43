"""What others write behind the optimizer's back: to its groups, to the memory of its parameters, to their types."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from distruction import BGD, NonFiniteError, Posterior, UsageError, ops


def made(device="cpu", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    return model, BGD(model.named_parameters(), data_per_step=16, **options)


def steps(model, opt, count=1):
    x, y = torch.linspace(-1, 1, 24).view(6, 4).to(model[0].weight.dtype), torch.arange(6) % 3
    for _ in range(count):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()


# --- values --------------------------------------------------------------------------------------


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def through_data(p):
    p.data.fill_(0.25)


def other_data(p):
    p.data = torch.full_like(p, 0.25)


def through_numpy(p):
    p.detach().numpy()[:] = 0.25


@pytest.mark.parametrize(
    ("write", "device"), [(through_numpy, "cpu"), *((w, d) for w in (through_data, other_data) for d in DEVICES)]
)
@pytest.mark.parametrize("use", ["train", "posterior", "state_dict", "closure"])
def test_writes_that_pytorch_does_not_count_become_the_means(write, device, use):
    model, opt = made(lr=0.0, device=device)
    opt.train()
    opt.eval()
    write(model[0].weight)
    if use == "train":
        opt.train()
        assert (model[0].weight != 0.25).any()
    elif use == "posterior":
        assert (opt.posterior().means["0.weight"] == 0.25).all()
    elif use == "state_dict":
        assert (opt.state_dict()["state"][0]["mean"] == 0.25).all()
    else:
        opt.step(lambda: model(torch.ones(2, 4, device=device)).sum().backward())
    opt.eval()
    assert (model[0].weight == 0.25).all()


def test_a_vector_of_all_weights_is_taken_over():
    """As evolutionary and line searches write it; also over a sample."""
    for mode in ("eval", "train"):
        model, opt = made()
        opt.train()
        steps(model, opt)
        if mode == "eval":
            opt.eval()
        wanted = torch.linspace(-1, 1, parameters_to_vector(model.parameters()).numel())
        vector_to_parameters(wanted, model.parameters())
        opt.train()
        opt.eval()
        assert torch.equal(parameters_to_vector(model.parameters()), wanted)


def test_nan_that_pytorch_does_not_count_is_refused():
    model, opt = made()
    opt.train()
    opt.eval()
    model[2].bias.data[1] = math.nan
    with pytest.raises(NonFiniteError, match=r"NaN or infinity was written to 2\.bias"):
        opt.train()


def test_a_model_that_changes_its_type_keeps_the_means():
    model, opt = made()
    opt.train()
    steps(model, opt)
    opt.eval()
    exact = opt.posterior()
    model.to(torch.bfloat16)
    assert all(torch.equal(m, exact.means[n]) for n, m in opt.posterior().means.items())
    opt.train()
    model.float()
    opt.train()
    opt.eval()
    # Neither the rounding of the means nor that of a sample has become a mean.
    for name, p in model.named_parameters():
        assert torch.equal(p, exact.means[name])


with_kernels = pytest.mark.skipif(
    ops.unavailable("cpp", "cpu") is not None,
    reason="without kernels plain PyTorch serves the CPU, in any floating type",
)


@with_kernels
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.zeros(3, dtype=torch.float64), "weight is torch.float64.*convert the model with model.float"),
        (lambda: torch.zeros(4).to(torch.float8_e4m3fn), "weight is torch.float8_e4m3fn"),
        (lambda: torch.zeros(1).expand(3), "weight is expanded"),
    ],
)
def test_parameters_that_no_kernel_takes_are_refused_by_name(tensor, message):
    with pytest.raises(UsageError, match=message):
        BGD([("weight", nn.Parameter(tensor()))])
    BGD([("weight", nn.Parameter(tensor(), requires_grad=False))])
    if tensor().dtype == torch.float64:
        BGD([("weight", nn.Parameter(tensor()))], backend="reference")


def test_parameters_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        p = nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match=r"parameter 0 was made in torch\.inference_mode"):
        BGD([p])


@with_kernels
def test_a_model_that_becomes_float64_is_refused_by_name():
    model, opt = made()
    opt.train()
    opt.eval()
    model.double()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError, match=r"0\.weight is torch\.float64"):
        opt.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", -1.0, "lr must be >= 0 and finite, not -1.0"),
        ("lr", math.nan, "lr must be >= 0 and finite, not nan"),
        ("kl_weight", 1.5, r"kl_weight \(lambda\) must be in \[0, 1\], not 1.5"),
        ("max_std", -1, "max_std must be > 0, not -1"),
        ("data_per_step", 0, "data_per_step must be > 0, not 0"),
        ("learn_mean", "no", "learn_mean must be True or False"),
        ("mc_samples", 4, "mc_samples cannot become 4 after 1 of the 2 samples of an update"),
        ("antithetic", False, "antithetic cannot become False after 1 of the 2 samples"),
    ],
)
def test_options_written_to_a_group_are_checked_like_the_constructors(option, value, message):
    model, _ = made()
    prior = Posterior.around(model, 0.1)
    opt = BGD(model.named_parameters(), mc_samples=2, prior=prior, kl_weight=0.5, std_init=prior)
    opt.train()
    steps(model, opt)
    before = [p.clone() for p in model.parameters()]
    was = opt.param_groups[0][option]
    opt.param_groups[0][option] = value
    with pytest.raises(UsageError, match=message):
        steps(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    opt.param_groups[0][option] = was
    steps(model, opt)


def test_samples_of_an_update_may_change_between_updates():
    model, opt = made(mc_samples=2)
    opt.train()
    steps(model, opt, 2)
    opt.param_groups[0]["mc_samples"] = 4
    steps(model, opt, 4)
    assert opt.state_dict()["param_groups"][0]["accumulated"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda opt: opt.param_groups.pop(), "param_groups has 1 groups and had 2.*requires_grad_"),
        (lambda opt: opt.param_groups.append(opt.param_groups[0]), "param_groups has 3 groups and had 2"),
        (lambda opt: opt.param_groups[1]["params"].pop(), "parameters was changed by hand.*requires_grad_"),
        (
            lambda opt: opt.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.zeros(8, 4))),
            "parameters was changed by hand.*add_param_group",
        ),
    ],
)
def test_groups_that_were_changed_by_hand(change, message):
    model, _ = made()
    opt = BGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    opt.train()
    steps(model, opt)
    change(opt)
    for use in (opt.train, opt.eval, lambda: steps(model, opt)):
        with pytest.raises(UsageError, match=message):
            use()


def test_parameters_may_be_replaced_before_the_first_draw():
    """As accelerate does where it shards a model that an optimizer was made for."""
    model, _ = made()
    prior = Posterior.around(model, 0.1)
    options = {"prior": prior, "kl_weight": 0.5, "std_init": prior, "mc_samples": 2}
    opt, expected = (BGD(model.named_parameters(), **options) for _ in range(2))
    expected.train()
    steps(model, expected, 2)
    expected.eval()
    other, _ = made()
    opt.param_groups[0]["params"] = list(other.parameters())
    opt.train()
    steps(other, opt, 2)
    opt.eval()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(opt.kl, expected.kl)


@pytest.mark.parametrize("option", ["lr", "std_init", "mc_samples", "seed", "backend", "data_per_step"])
def test_none_is_no_value(option):
    with pytest.raises(UsageError, match=f"{option} must be .*, not None"):
        BGD([nn.Parameter(torch.zeros(2))], **{option: None})


def test_numpys_numbers_are_numbers():
    exact, same = made(mc_samples=2, seed=5, lr=0.5), None
    numbers = {"mc_samples": np.int64(2), "seed": np.int32(5), "lr": np.float64(0.5)}
    same = made(**numbers)
    for model, opt in (exact, same):
        opt.train()
        steps(model, opt, 4)
        opt.eval()
    for a, b in zip(exact[0].parameters(), same[0].parameters(), strict=True):
        assert torch.equal(a, b)
    group = same[1].param_groups[0]
    assert (type(group["mc_samples"]), type(group["seed"])) == (int, int)
    with pytest.raises(UsageError, match="mc_samples must be an integer"):
        made(mc_samples=True)


# --- states --------------------------------------------------------------------------------------


def test_a_state_of_the_same_parameters_in_another_order_is_refused():
    """The names would go with the places: a prior, or a posterior, of the wrong weight."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    opt = BGD(model.named_parameters())
    opt.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.eval()
    other = BGD(list(model.named_parameters())[::-1])
    before = other.posterior().means
    with pytest.raises(UsageError, match=r"another order, a\.weight where the optimizer has b\.weight"):
        other.load_state_dict(opt.state_dict())
    assert all(torch.equal(m, before[n]) for n, m in other.posterior().means.items())
