"""PyTorch's and timm's generic optimizer cases, run over an entry for `BGD` in PyTorch's table of optimizers.

Of PyTorch's cases these say nothing of `BGD`: foreach and fused against the plain loop (one step, held to the oracle by
the matrix of ops), complex and sparse (refused: the table of errors), weight decay (refused), a ``step`` counter in the
state (there is none), schedulers one by one and AMP (test_conformance.py).
"""

import copy
import functools
import itertools
import math

import pytest
import timm.optim
import timm.scheduler
import torch
from test_optimizer import assert_same, values
from timm.optim import _optim_factory
from torch import nn
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer

from distruction import BGD, UsageError

common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch's own test helpers need expecttest"
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA or ROCm device"),
        ],
    ),
]


def inputs(device, dtype=None):
    published = {"max_mean_step": math.inf, "max_log_std_step": math.inf, "max_std": math.inf}
    table = {
        "default": {},
        "lr": {"lr": 0.5},
        "tensor lr": {"lr": torch.tensor(0.5)},
        "published rule": published,
        "data": {"std_init": 0.1, "data_per_step": 10.0},
        "antithetic pair": {"mc_samples": 2},
        "three samples": {"mc_samples": 3, "antithetic": False},
        "fixed std": {"learn_std": False},
        "maximize": {"maximize": True},
    }
    return [common.OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in table.items()]


def error_inputs(device, dtype):
    sparse, whole = (nn.Parameter(torch.randn(4, 2, device=device, dtype=dtype)) for _ in range(2))
    sparse.grad = torch.zeros_like(sparse).to_sparse()
    whole.grad = torch.zeros_like(whole)

    def case(error_on, params, message, **kwargs):
        given = common.OptimizerInput(params=params, kwargs=kwargs, desc=message)
        return common.ErrorOptimizerInput(given, error_on=error_on, error_type=UsageError, error_regex=message)

    construction, step = common.OptimizerErrorEnum.CONSTRUCTION_ERROR, common.OptimizerErrorEnum.STEP_ERROR
    return [
        *common.get_error_inputs_for_all_optims(device, dtype),
        case(construction, [nn.Parameter(torch.zeros(2, dtype=torch.complex64, device=device))], "complex"),
        case(construction, None, "lr must be >= 0", lr=-1e-2),
        case(construction, None, "differentiable", differentiable=True),
        case(step, [sparse], "sparse"),
        case(step, [whole], "call opt.train"),
    ]


INFO = common.OptimizerInfo(
    BGD,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    supports_multiple_devices=False,
)
CONFIGURATIONS = [pytest.param(i.kwargs, id=i.desc) for i in INFO.optim_inputs_func("cpu")]
SCHEDULERS = [(), *INFO.scheduler_inputs]
over_configurations = pytest.mark.parametrize("kwargs", CONFIGURATIONS)
over_devices = pytest.mark.parametrize("device", DEVICES)


def weights(device="cpu", *, contiguous=True):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, 2, generator=g).to(device)[..., 0]
    bias, x = torch.randn(10, 2, generator=g).to(device)[..., 0], torch.randn(5, generator=g).to(device)
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return nn.Parameter(weight), nn.Parameter(bias), x


def make(params, kwargs):
    return INFO.optim_cls(params, **copy.deepcopy(kwargs))


def quadratic(opt, weight, bias, x):
    opt.zero_grad()
    loss = (weight.mv(x) + bias).square().sum()
    loss.backward()
    return loss


def quadratic_of(opt, weight, bias, x):
    return functools.partial(quadratic, opt, weight, bias, x)


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        assert_same(list(state.values()), list(b["state"][key].values()))


def went_right(before, after, kwargs):
    return after > before if kwargs.get("maximize", False) else after < before


# --- PyTorch's ----------------------------------------------------------------------------------------


@over_devices
def test_errors(device):
    cases = INFO.optim_error_inputs_func(device, torch.float32)
    assert len(cases) >= (9 if device == "cpu" else 5)
    for case in cases:
        given = case.optimizer_error_input
        params = weights(device)[:2] if given.params is None else given.params
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex):
                BGD(params, **given.kwargs)
        elif case.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                BGD(params, **given.kwargs)
        else:
            opt = BGD(params, **given.kwargs)
            if given.desc == "sparse":
                opt.train()
            with pytest.raises(case.error_type, match=case.error_regex):
                opt.step()


@over_devices
@over_configurations
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=lambda s: f"{len(s)} schedulers")
def test_goes_in_the_right_direction(device, kwargs, contiguous, schedulers):
    weight, bias, x = weights(device, contiguous=contiguous)
    opt = make([weight, bias], kwargs)
    schedulers = [make_scheduler(opt) for make_scheduler in schedulers]
    closure = quadratic_of(opt, weight, bias, x)
    first = closure().item()
    for _ in range(20):
        loss = opt.step(closure).detach()
        for scheduler in schedulers:
            takes_a_metric = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([loss] if takes_a_metric else []))
    assert went_right(first, closure().item(), kwargs)


@over_configurations
@pytest.mark.parametrize("dimensions", [0, 1])
def test_a_tensor_lr_is_a_float_lr_and_is_left_alone(kwargs, dimensions):
    lr = torch.full([1] * dimensions, 0.5)
    runs = []
    for given in (0.5, lr):
        weight, bias, x = weights()
        opt = make([weight, bias], {**kwargs, "lr": given})
        for _ in range(5):
            opt.step(quadratic_of(opt, weight, bias, x))
        runs.append([weight.detach(), bias.detach()])
        assert opt.param_groups[0]["lr"] == 0.5
    assert_same(*runs)
    assert lr.shape == (1,) * dimensions
    assert lr == 0.5


@over_configurations
def test_groups_have_their_own_lr(kwargs):
    weight, bias, x = weights()
    still = nn.Parameter(torch.randn(2))
    before = still.detach().clone()
    opt = make([{"params": [weight, bias], **copy.deepcopy({"lr": 0.5, **kwargs})}, {"params": [still]}], {"lr": 0.0})
    closure = quadratic_of(opt, weight, bias, x)
    first = closure().item()
    opt.train()
    for _ in range(21):
        closure()
        still.grad = torch.rand(2)
        opt.step()
    opt.eval()
    assert went_right(first, closure().item(), kwargs)
    assert torch.equal(still, before)


@over_configurations
def test_a_step_changes_nothing_where_no_parameter_takes_a_gradient(kwargs):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    opt = make(params, kwargs)
    opt.step(lambda: torch.ones(1))
    assert_same(before, params)
    assert not opt.state


@over_configurations
def test_a_step_changes_nothing_where_gradients_are_zero(kwargs):
    param = nn.Parameter(torch.randn(5, 1))
    param.grad = torch.zeros_like(param)
    before = param.detach().clone()
    opt = make([("w", param)], kwargs)
    opt.step(lambda: torch.ones(1))
    assert torch.equal(before, param)
    assert_same(values(opt), [before, torch.full_like(before, kwargs.get("std_init", 0.05))])


@over_configurations
def test_the_options_are_printed(kwargs):
    opt = make(weights()[:2], kwargs)
    assert repr(opt).startswith("BGD (")
    for name, value in kwargs.items():
        assert name not in opt.defaults or f"{name}: {value}" in repr(opt)


@over_devices
@over_configurations
def test_a_state_dict_makes_another_optimizer_the_same(device, kwargs):
    weight, bias, x = weights()
    opt = make([weight, bias], kwargs)
    for _ in range(10):
        opt.step(quadratic_of(opt, weight, bias, x))
    weight_2, bias_2 = (nn.Parameter(p.detach().clone().to(device)) for p in (weight, bias))
    opt_2 = make([weight_2, bias_2], kwargs)
    saved = copy.deepcopy(opt.state_dict())
    opt_2.load_state_dict(saved)
    assert_same_state(saved, opt.state_dict())  # loading has not changed it
    for _ in range(10):
        opt.step(quadratic_of(opt, weight, bias, x))
        opt_2.step(quadratic_of(opt_2, weight_2, bias_2, x.to(device)))
        exact = {"rtol": 0, "atol": 0} if device == "cpu" else {}
        for p, p_2 in ((weight, weight_2), (bias, bias_2)):
            torch.testing.assert_close(p, p_2.to("cpu"), **exact)
    assert len(opt.state_dict()["state"]) == 2
    if device == "cpu":
        assert_same_state(opt.state_dict(), opt_2.state_dict())
        # https://github.com/pytorch/pytorch/issues/36831: repeated parameters have one representation.
        opt_2.param_groups.extend(opt_2.param_groups)
        assert opt.state_dict()["param_groups"][-1] == opt_2.state_dict()["param_groups"][-1]


@over_configurations
def test_a_state_without_the_newer_options_is_taken(kwargs):
    weight, bias, x = weights()
    opt = make([weight, bias], kwargs)
    for _ in range(3):
        opt.step(quadratic_of(opt, weight, bias, x))
    older = copy.deepcopy(opt.state_dict())
    for name in ("maximize", "stochastic_rounding", "backend", *kwargs):
        older["param_groups"][0].pop(name, None)
    weight_2, bias_2 = (nn.Parameter(p.detach().clone()) for p in (weight, bias))
    opt_2 = make([weight_2, bias_2], kwargs)
    opt_2.load_state_dict(older)
    for _ in range(3):
        opt.step(quadratic_of(opt, weight, bias, x))
        opt_2.step(quadratic_of(opt_2, weight_2, bias_2, x))
    assert_same([weight.detach(), bias.detach()], [weight_2.detach(), bias_2.detach()])


@pytest.mark.parametrize("of", ["AdamW", "mean alone", "another shape"])
def test_a_foreign_state_is_refused_and_changes_nothing(of):
    weight, bias, x = weights()
    source = torch.optim.AdamW([weight, bias]) if of == "AdamW" else BGD([weight, bias])
    source.step(quadratic_of(source, weight, bias, x))
    foreign = copy.deepcopy(source.state_dict())
    if of == "mean alone":
        del foreign["state"][1]["std"]
    elif of == "another shape":
        foreign["state"][1]["std"] = torch.ones(3)
    message = {
        "AdamW": "the state_dict is not of a BGD",
        "mean alone": "the state of b has no mean and std, only mean",
        "another shape": r"std of b has shape \(3,\) and the parameter \(10,\)",
    }
    weight, bias, x = weights()
    opt = BGD([("w", weight), ("b", bias)])
    opt.step(quadratic_of(opt, weight, bias, x))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(UsageError, match=message[of]):
        opt.load_state_dict(foreign)
    assert_same_state(before, opt.state_dict())


@pytest.mark.parametrize("named", [(False, True), (True, False), (True, True)], ids=str)
def test_a_state_dict_with_names_and_one_without(named):
    made = []
    for has_names, names in zip(named, (["w", "b"], ["weight", "bias"]), strict=True):
        weight, bias, x = weights()
        opt = BGD(list(zip(names, (weight, bias), strict=True)) if has_names else [weight, bias])
        made.append((opt, weight, bias, x))
    opt, weight, bias, x = made[0]
    for _ in range(3):
        opt.step(quadratic_of(opt, weight, bias, x))
    made[1][0].load_state_dict(opt.state_dict())
    # torch's rule: the saved names, if there are any, else the optimizer's own.
    assert made[1][0].param_groups[0]["param_names"] == (["w", "b"] if named[0] else ["weight", "bias"])
    for opt, weight, bias, x in made:
        for _ in range(3):
            opt.step(quadratic_of(opt, weight, bias, x))
    assert_same(*([m[1].detach(), m[2].detach()] for m in made))


@over_configurations
def test_a_deep_copy_has_all_public_attributes(kwargs):
    weight, bias, x = weights()
    opt = make([weight, bias], kwargs)
    opt.step(quadratic_of(opt, weight, bias, x))
    public = [{k for k in vars(o) if not k.startswith("_")} for o in (opt, copy.deepcopy(opt))]
    assert public[0] == public[1]


def test_step_hooks_of_all_optimizers_and_of_this_one():
    weight, bias, x = weights()
    opt = BGD([weight, bias])
    called = []

    def noting(name):
        return lambda *_: called.append(name)

    def with_closure(optimizer, args, kwargs):
        called.append("pre")
        return (optimizer, quadratic_of(opt, weight, bias, x)), kwargs

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(noting("pre of all")),
        torch_optimizer.register_optimizer_step_post_hook(noting("post of all")),
        opt.register_step_pre_hook(with_closure),
        opt.register_step_post_hook(noting("post")),
    ]
    try:
        # The closure that the hook puts in is used: without one this is an error.
        assert opt.step() > 0
        assert called == ["pre of all", "pre", "post", "post of all"]
    finally:
        for handle in handles:
            handle.remove()
    opt.step(quadratic_of(opt, weight, bias, x))
    assert len(called) == 4


def test_state_dict_hooks_see_and_change_the_state():
    weight, bias, x = weights()
    opt = BGD([weight, bias])
    opt.step(quadratic_of(opt, weight, bias, x))
    called = []

    def marked(optimizer, state_dict):
        return {**state_dict, "mark": 1}

    opt.register_state_dict_pre_hook(lambda o: called.append("before"))
    opt.register_state_dict_post_hook(marked)
    opt.register_state_dict_post_hook(lambda o, s: called.append(sorted(s)), prepend=True)
    saved = opt.state_dict()
    assert saved["mark"] == 1
    assert called == ["before", ["param_groups", "state"]]

    def moved(optimizer, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["state"][1]["mean"] += 1
        changed["param_groups"][0]["lr"] = 0.25
        return changed

    def scaled(optimizer):
        # Called when everything is in its place: the parameters hold the means already.
        assert torch.equal(bias_2, optimizer.state[bias_2]["mean"])
        for state in optimizer.state.values():
            state["std"] *= 0.5

    weight_2, bias_2, _ = weights()
    opt_2 = BGD([nn.Parameter(weight_2.detach().bfloat16()), bias_2])
    opt_2.register_load_state_dict_pre_hook(moved)
    opt_2.register_load_state_dict_post_hook(scaled)
    opt_2.load_state_dict(saved)
    assert opt_2.param_groups[0]["lr"] == 0.25
    assert torch.equal(bias_2, bias + 1)
    first, second = opt_2.state.values()
    assert torch.equal(first["mean"], weight.detach())
    assert torch.equal(second["std"], 0.5 * opt.state[bias]["std"])


# --- timm's -------------------------------------------------------------------------------------------


@pytest.fixture
def create(monkeypatch):
    """timm's factory, which knows ``bgd``."""
    entry = timm.optim.OptimInfo("bgd", BGD, "Bayesian Gradient Descent", has_eps=False, defaults={"std_init": 0.1})
    monkeypatch.setitem(_optim_factory.default_registry._optimizers, "bgd", entry)
    return functools.partial(timm.optim.create_optimizer_v2, opt="bgd")


def test_timms_registry_lists_and_makes_it(create):
    assert "bgd" in timm.optim.list_optimizers()
    assert timm.optim.get_optimizer_class("bgd")(weights()[:2]).defaults["max_std"] == 0.1
    model = timm.create_model("test_vit", num_classes=3)
    opt = create(model, lr=0.5, seed=7)
    assert isinstance(opt, BGD)
    assert {g["lr"] for g in opt.param_groups} == {0.5}
    assert {g["seed"] for g in opt.param_groups} == {7}
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    with pytest.raises(UsageError, match="weight_decay"):
        create(model, weight_decay=0.05)
    # The way to a posterior by name.
    opt = create(model, param_group_fn=lambda m: list(m.named_parameters()))
    assert set(opt.posterior()) == {name for name, _ in model.named_parameters()}


def test_timms_layer_decay_scales_the_lr(create):
    model = timm.create_model("test_vit", num_classes=3)
    opt, adamw = (create(model, opt=name, lr=0.5, layer_decay=0.7) for name in ("bgd", "adamw"))
    for optimizer in (opt, adamw):
        timm.scheduler.CosineLRScheduler(optimizer, t_initial=5).step(2)
    assert len({g["lr"] for g in opt.param_groups}) > 3
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in adamw.param_groups]
    with pytest.raises(UsageError, match="weight_decay"):
        create(model, layer_decay=0.7, weight_decay=0.05)


TIMM_GROUPS = {
    "parameters": lambda weight, bias: [weight, bias],
    "groups": lambda weight, bias: [{"params": [weight]}, {"params": [bias], "lr": 1.5}],
    "one": lambda weight, bias: [{"params": bias, "lr": 1.5}],
}


@pytest.mark.parametrize("groups", TIMM_GROUPS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("options", [{}, {"mc_samples": 2}, {"lr": 0.5, "antithetic": False}], ids=str)
def test_timms_basic_case(create, groups, contiguous, options):
    """200 steps bring a quadratic loss down; the bias alone, bounded by the trust region, does not take it as far."""
    weight, bias, x = weights(contiguous=contiguous)
    opt = create(TIMM_GROUPS[groups](weight, bias), data_per_step=10, **options)
    closure = quadratic_of(opt, weight, bias, x)
    first = closure().item()
    for _ in range(200):
        opt.step(closure)
    assert closure().item() < (first if groups == "one" else 0.1 * first)


def test_timms_model_case(create):
    """Twenty steps of a small network, each of which lowers its output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    opt = create(model)

    def closure():
        opt.zero_grad()
        loss = model(x).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(20):
        losses.append(closure().item())
        opt.step(closure)
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_timms_rosenbrock_case(create):
    """Cyclic coordinate descent on Rosenbrock's function comes nearer to the solution.

    With a fixed std: the curvature of 2000 steps would all but end the steps of one that learns.
    """
    point = nn.Parameter(torch.tensor([1.5, 1.5]))
    opt = create([point], std_init=math.sqrt(1e-3), learn_std=False)

    def closure(coordinate):
        opt.zero_grad()
        x, y = point
        loss = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        loss.backward()
        point.grad[1 - coordinate] = 0
        return loss

    first = point.detach().dist(torch.ones(2))
    for step in range(2000):
        opt.step(functools.partial(closure, step % 2))
    assert point.detach().dist(torch.ones(2)) < first


TIMM_SCHEDULERS = {
    "cosine": lambda o: timm.scheduler.CosineLRScheduler(o, 6, warmup_t=2, warmup_lr_init=1e-3, cycle_limit=2),
    "tanh": lambda o: timm.scheduler.TanhLRScheduler(o, 6),
    "step": lambda o: timm.scheduler.StepLRScheduler(o, 2, decay_rate=0.5),
    "multistep": lambda o: timm.scheduler.MultiStepLRScheduler(o, [2, 4], decay_rate=0.5),
    "poly": lambda o: timm.scheduler.PolyLRScheduler(o, 6, noise_range_t=(1, 5)),
}


@pytest.mark.parametrize("name", TIMM_SCHEDULERS)
def test_timms_schedulers_follow_sgd(create, name):
    def groups(params):
        return [{"params": [params[0]], "lr_scale": 0.5}, {"params": [params[1]]}]

    made = []
    for optimizer in (create(groups(weights()), lr=0.1), SGD(groups(weights()), lr=0.1)):
        made.append((optimizer, TIMM_SCHEDULERS[name](optimizer)))
    seen = []
    for epoch in range(1, 7):
        for _, scheduler in made:
            scheduler.step(epoch)
        ours, theirs = ([g["lr"] for g in optimizer.param_groups] for optimizer, _ in made)
        assert ours == theirs
        seen.append(ours)
    assert seen[0] != seen[-1]
