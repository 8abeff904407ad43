"""BGD where people use torch's own optimizers: groups, schedulers, AMP, clipping, accumulation, compile, graphs.

With a fixed std and a loss that is linear in the weights BGD is SGD with step size lr * std**2 (the gradient does not
depend on the sample), so that torch's SGD is the peer of most tests here.
"""

import copy
import warnings

import pytest
import torch
from test_optimizer import assert_same, batch, make_model, train_steps, values
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers

from distruction import BGD, Posterior, UsageError, ops, posterior

STD = 0.5


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 5), (7,), ())]


def linear_loss(params, step):
    g = torch.Generator().manual_seed(100 + step)
    return sum((p * torch.randn(p.shape, generator=g)).sum() for p in params)


def as_sgd(params, lr=0.1, **options):
    """A BGD that does what ``SGD(params, lr)`` does on a loss that is linear in the weights."""
    options = {"std_init": STD, "max_mean_step": float("inf"), "learn_std": False, **options}
    opt = BGD(params, lr=lr / STD**2, **options)
    opt.train()
    return opt


def assert_means(opt, params):
    for p, expected in zip((p for g in opt.param_groups for p in g["params"]), params, strict=True):
        torch.testing.assert_close(opt.state[p]["mean"], expected.detach())


# --- against SGD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_follows_sgd(maximize, lr):
    ours, theirs = weights(), weights()
    opt, sgd = as_sgd(ours, lr, maximize=maximize), SGD(theirs, lr, maximize=maximize)
    for step in range(5):
        for params, optimizer in ((ours, opt), (theirs, sgd)):
            optimizer.zero_grad()
            linear_loss(params, step).backward()
            optimizer.step()
    assert_means(opt, theirs)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(set_to_none):
    params = weights()
    opt = as_sgd(params)
    linear_loss(params, 0).backward()
    opt.step()
    opt.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in params)
    before = [opt.state[p]["mean"].clone() for p in params]
    opt.step()
    assert_means(opt, before)


def test_empty_gradients_change_nothing():
    params = weights()
    opt = as_sgd(params)
    held = [p.detach().clone() for p in params]
    opt.step()
    assert_same(held, [p.detach() for p in params])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_groups_and_added_groups_follow_sgd(backend):
    ours, theirs = weights(), weights()

    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:2], "lr": 0.3 / STD**2 if params is ours else 0.3}]

    opt, sgd = as_sgd(groups(ours), backend=backend), SGD(groups(theirs), 0.1)
    for step in range(6):
        if step == 3:
            opt.add_param_group({"params": ours[2:], "lr": 0.02 / STD**2})
            sgd.add_param_group({"params": theirs[2:], "lr": 0.02})
        for params, optimizer in ((ours, opt), (theirs, sgd)):
            optimizer.zero_grad()
            linear_loss(params, step).backward()
            optimizer.step()
    assert_means(opt, theirs)


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, o.param_groups[0]["lr"] / 10, o.param_groups[0]["lr"], 2,
                                              cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, o.param_groups[0]["lr"], 8, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, o.param_groups[0]["lr"] / 10, anneal_epochs=3),
}  # fmt: skip


def test_every_scheduler_of_torch_is_tried():
    found = {n for n in schedulers.__all__ if n.endswith(("LR", "Restarts", "Scheduler", "Plateau"))} - {"LRScheduler"}
    assert found - {"SWALR"} <= set(SCHEDULERS)


@pytest.mark.parametrize("number", [float, torch.tensor])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_follow_sgd(name, number):
    ours, theirs = weights(), weights()
    opt, sgd = as_sgd(ours, number(0.1)), SGD(theirs, number(0.1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in")
        pairs = [(ours, opt, SCHEDULERS[name](opt)), (theirs, sgd, SCHEDULERS[name](sgd))]
        for step in range(6):
            for params, optimizer, scheduler in pairs:
                optimizer.zero_grad()
                linear_loss(params, step).backward()
                optimizer.step()
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert_means(opt, theirs)


def test_state_dict_survives_a_file_and_a_move(tmp_path):
    model, device = make_model(), "cuda" if torch.cuda.is_available() else "cpu"
    opt = BGD(model.named_parameters(), std_init=0.1, data_per_step=16, mc_samples=2)
    opt.train()
    train_steps(model, opt, range(5))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "f")
    saved = torch.load(tmp_path / "f", map_location=device, weights_only=True)
    other = make_model(1).to(device)
    again = BGD(other.named_parameters(), std_init=0.1, data_per_step=16, mc_samples=2)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert all(t.device.type == device for state in again.state.values() for t in state.values())
    assert_same(values(opt), [t.cpu() for t in values(again)])
    # The samples of two devices' kernels agree to 1e-6 of std, 0.1 here, and their rounding.
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-6, "atol": 1e-7}
    for p, p_2 in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, p_2.cpu(), **exact)


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable", "differentiable", "weight_decay", "momentum"])
def test_options_of_other_optimizers_are_refused_with_a_reason(option):
    with pytest.raises(UsageError, match=f"BGD has no option '{option}': "):
        BGD(weights(), **{option: True})
    with pytest.raises(UsageError, match=f"BGD has no option '{option}': "):
        BGD([{"params": weights(), option: 0.5}])
    BGD([{"params": weights(), option: 0}])
    BGD(weights(), **{option: 0})


def test_unknown_options_are_refused():
    with pytest.raises(UsageError, match="BGD has no option 'learning_rate'"):
        BGD(weights(), learning_rate=1.0)


# --- mixed precision ------------------------------------------------------------------------------------


def amp_run(dtype, scaler, *, clip=None, accumulate=1, mc_samples=1, steps=6, overflow_at=None):
    model = make_model()
    opt = BGD(model.named_parameters(), std_init=0.1, data_per_step=16, mc_samples=mc_samples)
    opt.train()
    history = []
    for i in range(steps):
        opt.zero_grad()
        for part in range(accumulate):
            x, y = batch(i * accumulate + part)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(x), y) / accumulate
            scaler.scale(loss).backward()
        if i == overflow_at:
            model[0].weight.grad[0, 0] = float("inf")
        if clip is not None:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = copy.deepcopy(opt.state_dict())
        scaler.step(opt)
        scaler.update()
        history.append((before, copy.deepcopy(opt.state_dict())))
    return values(opt), history


def scaler(enabled=True):
    return torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10)


@pytest.mark.parametrize("mc_samples", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_scale_changes_nothing(mc_samples, clip, accumulate):
    """A power of two times the gradient is exact in float32, so that scaled and unscaled runs agree to the bit."""
    options = {"mc_samples": mc_samples, "clip": clip, "accumulate": accumulate}
    scaled, _ = amp_run(None, scaler(), **options)
    plain, _ = amp_run(None, scaler(enabled=False), **options)
    assert_same(scaled, plain)


def test_clipping_acts_before_the_statistics():
    clipped, _ = amp_run(None, scaler(), clip=0.05)
    free, _ = amp_run(None, scaler())
    assert not torch.equal(clipped[0], free[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(dtype):
    low, _ = amp_run(dtype, scaler())
    full, _ = amp_run(None, scaler())
    start = 0.1
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.2 * start)


@pytest.mark.parametrize("mc_samples", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_overflowed_step_changes_nothing(mc_samples, clip):
    _, history = amp_run(None, scaler(), mc_samples=mc_samples, clip=clip, overflow_at=3)
    before, after = history[3]
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][index][key])
    assert before["param_groups"][0]["draw"] == after["param_groups"][0]["draw"] == 3
    assert history[4][1]["param_groups"][0]["draw"] == 4


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_a_bfloat16_model_has_float32_state(stochastic_rounding):
    model = make_model().to(torch.bfloat16)
    opt = BGD(model.named_parameters(), std_init=0.01, data_per_step=16, stochastic_rounding=stochastic_rounding)
    opt.train()
    for i in range(5):
        x, y = batch(i)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
        opt.step()
    assert all(t.dtype == torch.float32 for s in opt.state.values() for t in s.values())
    # Updates smaller than bfloat16's last place are kept by the state.
    weight = model[0].weight
    assert not torch.equal(opt.state[weight]["mean"], opt.state[weight]["mean"].bfloat16().float())
    opt.eval()
    assert torch.equal(weight.detach(), opt.state[weight]["mean"].bfloat16())


# --- torch.compile ----------------------------------------------------------------------------------------


def compile_case(name):
    """A small model and its BGD with a Tensor lr."""
    model = make_model()
    options, params = {}, list(model.named_parameters())
    if name == "prior":
        options = {"prior": Posterior.around(model, 0.1), "kl_weight": 0.1}
    elif name == "two samples":
        options = {"mc_samples": 2}
    elif name == "groups":
        params = [{"params": params[:2], "learn_mean": False}, {"params": params[2:], "data_per_step": 8}]
    elif name == "bfloat16":
        model.to(torch.bfloat16)
        options = {"stochastic_rounding": True}
    options = {"data_per_step": 16, **options}
    return model, BGD(params, lr=torch.tensor(0.5), std_init=0.1, **options)


def compiled_run(name, compiled):
    """The posterior after eight steps, and how many graphs the last four have added."""
    torch._dynamo.reset()
    model, opt = compile_case(name)
    step = torch.compile(opt.step, fullgraph=True, backend="aot_eager") if compiled else opt.step
    opt.train()
    frames = {}
    for i in range(8):
        x, y = batch(i)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)).float(), y).backward()
        step()
        opt.param_groups[0]["lr"].mul_(0.9)
        frames[i] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return values(opt), frames[7] - frames[3]


@pytest.mark.parametrize("name", ["plain", "prior", "two samples", "groups", "bfloat16"])
def test_a_compiled_step_has_no_graph_break_and_the_same_bits(name):
    expected, _ = compiled_run(name, compiled=False)
    found, added = compiled_run(name, compiled=True)
    assert added == 0
    assert_same(expected, found)


def test_a_compiled_training_step_breaks_at_backward_alone():
    """Forward, backward and step in one compiled function: torch does not trace ``backward`` by default."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runs = []
    for compiled in (False, True):
        model, opt = compile_case("plain")
        opt.train()

        def train(x, y, model=model, opt=opt):
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()

        run = torch.compile(train, backend="aot_eager") if compiled else train
        for i in range(4):
            opt.zero_grad()
            run(*batch(i))
        runs.append(values(opt))
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    assert len(breaks) == 1
    assert "backward" in breaks[0]
    assert_same(*runs)


def test_a_compiled_step_tells_of_nan_at_eval():
    torch._dynamo.reset()
    model = make_model()
    opt = BGD(model.named_parameters())
    opt.train()
    x, y = batch(0)
    (nn.functional.cross_entropy(model(x), y) * float("nan")).backward()
    torch.compile(opt.step, fullgraph=True, backend="eager")()
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        opt.eval()


# --- CUDA graphs --------------------------------------------------------------------------------------------


GRAPH_CASES = {"plain": {}, "two samples": {"mc_samples": 2}, "prior": {"kl_weight": 0.1}}


def graph_case(name, device, backend="auto"):
    params = {f"p{i}": nn.Parameter(p.detach().to(device)) for i, p in enumerate(weights())}
    lr = torch.tensor(0.5, device=device)
    options = GRAPH_CASES[name]
    if name == "prior":
        means = {n: p.detach().clone() for n, p in params.items()}
        options = {**options, "prior": Posterior(means, {n: torch.full_like(m, 0.2) for n, m in means.items()})}
    opt = BGD(params.items(), lr=lr, std_init=0.1, data_per_step=8, backend=backend, **options)
    opt.train()
    return list(params.values()), lr, opt


@pytest.mark.parametrize("name", GRAPH_CASES)
def test_a_step_on_a_gpu_asks_nothing_of_it(name, monkeypatch):
    """What would wait for the device, and so cannot be captured, is an error for tensors without data."""
    # The prior is made before the loop, and looks at its values.
    monkeypatch.setattr(posterior.posterior_file, "fault_of", lambda *_: None)
    monkeypatch.setattr(posterior, "raise_together", lambda *_: None)
    with FakeTensorMode():
        try:
            torch.empty_like(torch.empty(2, device="cuda:0")).copy_(torch.empty(2, device="cuda:0"))
        except RuntimeError as error:
            pytest.skip(
                f"torch {torch.__version__} needs a GPU's driver for tensors without data: {str(error).splitlines()[0]}"
            )
        params, _, opt = graph_case(name, "cuda:0")
        opt.grad_scale, opt.found_inf = (torch.tensor(v, device="cuda:0") for v in (2.0, 0.0))
        for _ in range(4):
            for p in params:
                p.grad = torch.zeros_like(p)
            opt.step()
        with pytest.raises(DataDependentOutputException):
            opt.raise_if_nonfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA or ROCm device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", GRAPH_CASES)
def test_a_training_step_replays_from_a_cuda_graph_as_it_runs(name, backend):
    """Forward, backward and step of a loss without sums, so that its gradient has one order of operations."""
    if (reason := ops.unavailable(backend, "cuda")) is not None:
        pytest.skip(reason)

    def run(graph):
        params, lr, opt = graph_case(name, "cuda", backend)
        target = torch.zeros((), device="cuda")

        def update():
            for _ in range(opt.param_groups[0]["mc_samples"]):
                opt.zero_grad()
                sum((p - target).square().sum() for p in params).backward()
                opt.step()

        lrs = []
        for i in range(8):
            target.fill_(i / 8)
            lr.fill_(0.5 * 0.7**i)
            lrs.append(lr.item())
            if graph is None or i < 3:
                # Warm-up is on a side stream, as torch.cuda.graph asks.
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    update()
                torch.cuda.current_stream().wait_stream(side)
                continue
            if i == 3:
                opt.zero_grad()
                with torch.cuda.graph(graph):
                    update()
            graph.replay()
        kl = opt.kl
        sample = [p.detach().clone() for p in params]
        opt.eval()
        state = opt.state_dict()
        return [*values(opt), *sample, *([] if kl is None else [kl.clone()])], state["param_groups"][0]["draw"], lrs

    eager, captured = run(None), run(torch.cuda.CUDAGraph())
    assert eager[1:] == captured[1:]
    assert len(set(eager[2])) == 8
    assert_same(eager[0], captured[0])
