"""Every op, with every option, for every backend of `backends.TABLE`, against the float64 reference.

Tolerances are the contract's, element by element: normals agree to 4e-6 * max(1, |eps|), and what follows from them
to that times its sensitivity; the rest is the rounding of float32 operations: the implicit pull towards the prior, the
longest chain, has eight.
"""

import math
from dataclasses import replace

import pytest
import torch
from backends import PARAMETERS
from workloads import (
    CODES,
    SIZES,
    Model,
    Options,
    accumulate,
    gauss_newton,
    make_model,
    normals,
    sample,
    step,
    with_codes,
)

from distruction import ops
from distruction.compression import BLOCK, LogCodes
from distruction.ops import cpp, reference
from distruction.ops.reference.kl import kl_terms

# The interpreter computes both sides of a choice, as a GPU does.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

EPS = 4e-6
ROUNDING = 8 * 2.0**-24


@pytest.fixture(params=PARAMETERS)
def backend(request, monkeypatch):
    reason = request.param.unavailable()
    if reason is not None:
        pytest.skip(reason)
    if request.param.instruction_set:
        monkeypatch.setenv(cpp.ENVIRONMENT, request.param.instruction_set)
    return request.param


def error_of_normals(eps):
    return EPS * eps.abs().clamp(min=1)


def error_of_store(theta, dtype, stochastic=False):
    """The rounding of a value to its type: half a unit in the last place, a whole one if it is stochastic."""
    info = torch.finfo(dtype)
    return theta.abs() * info.eps * (1.0 if stochastic else 0.5) + info.smallest_normal * info.eps


def assert_close(ours, exact, allowed, what):
    for i, (a, e, tolerance) in enumerate(zip(ours, exact, allowed, strict=True)):
        excess = ((a.cpu().double() - e).abs() - tolerance).max().item() if e.numel() else -1.0
        assert excess <= 0, f"{what}[{i}] is off by {excess:.3g} more than allowed"


def check_step(backend, before, o, misaligned=False):
    """One step of ``before`` by a backend: state, sample, counters and KL; the statistics stay."""
    exact, ours = before.to(dtype=torch.float64), before.to(backend.device, misaligned=misaligned)
    expected = step(exact, o)
    counters, kl = step(ours, o, backend)
    assert counters == expected[0]
    assert kl == pytest.approx(expected[1], rel=1e-5)
    means, stds, params = [], [], []
    for i, (mean, std, grad) in enumerate(zip(*(before[n] for n in ("mean", "std", "grad")), strict=True)):
        mean, std, grad = mean.double(), std.double(), grad.double().abs()
        largest = abs(o.loss_scale) * grad / (o.grad_scale or 1.0)
        if o.statistics or o.pair:
            sums = before["m1"][i].double().abs() + (before["m2"][i].double().abs() if o.statistics else 0.0)
            largest = largest + abs(o.loss_scale) * sums
        old, new = (normals(before, i, o.counters[0] + k, o.antithetic) for k in (0, 1))
        # |delta log std| <= |delta a|, a = std * s2 / 2: its part by the normals and by rounding of its terms.
        s2 = 0.5 * std * (largest * error_of_normals(old) + ROUNDING * largest * (1 + old.abs()))
        stds.append(exact["std"][i] * (s2 + ROUNDING))
        step_size = o.lr * std**2 * largest
        moved = step_size.clamp(max=o.max_mean_step * std) + before["prior_mean"][i].double().abs() + mean.abs()
        means.append(ROUNDING * moved)
        theta = means[-1] + stds[-1] * new.abs() + exact["std"][i] * error_of_normals(new)
        value = exact["param"][i]
        dtype = before["param"][i].dtype
        params.append(theta + ROUNDING * value.abs() + error_of_store(value, dtype, o.stochastic_rounding))
    assert_close(ours["mean"], exact["mean"], means, "mean")
    assert_close(ours["std"], exact["std"], stds, "std")
    assert_close(ours["param"], exact["param"], params, "param")
    for name in ("m1", "m2"):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours[name], before[name], strict=True)), name


STEPS = {
    "plain": Options(),
    "statistics": Options(statistics=True, counters=(5, 2, 0)),
    "no prior": Options(prior=False),
    "no prior, statistics": Options(prior=False, statistics=True, counters=(5, 2, 0)),
    "antithetic, first of a pair": Options(antithetic=True, counters=(4, 0, 0)),
    "antithetic, second of a pair": Options(antithetic=True, counters=(5, 0, 0)),
    "pair": Options(pair=True, antithetic=True, counters=(5, 1, 0)),
    "pair, no prior": Options(pair=True, antithetic=True, prior=False, counters=(5, 1, 0)),
    "pair, grad_scale": Options(pair=True, antithetic=True, grad_scale=3.0, found_inf=0.0, counters=(5, 1, 0)),
    "draw beyond 32 bits": Options(counters=(2**32 - 1, 0, 0)),
    "grad_scale": Options(grad_scale=3.0, found_inf=0.0),
    "grad_scale, statistics": Options(grad_scale=3.0, found_inf=0.0, statistics=True, counters=(5, 2, 0)),
    "fixed mean": Options(learn_mean=False),
    "fixed std": Options(learn_std=False),
    "fixed mean, no prior": Options(learn_mean=False, prior=False),
    "unbounded": Options(max_mean_step=math.inf, max_log_std_step=math.inf, max_std=math.inf, loss_scale=5.0),
    "wide bounds": Options(max_mean_step=3.0, max_log_std_step=2.0, max_std=math.inf),
    "prior alone": Options(kl_weight=1.0),
    "maximize": Options(loss_scale=-50.0),
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_step(backend, options):
    check_step(backend, make_model("cpu"), options)


TYPES = pytest.mark.parametrize(
    ("param", "grad", "stochastic"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float16, False),
        (torch.float32, torch.bfloat16, False),
    ],
)
ALIGNMENTS = pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])


@ALIGNMENTS
@TYPES
def test_step_in_every_type(backend, param, grad, stochastic, misaligned):
    model = make_model("cpu", param=param, grad=grad)
    check_step(backend, model, Options(stochastic_rounding=stochastic), misaligned)


def test_tensors_of_many_types_in_one_call(backend):
    model = make_model("cpu")
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16) * 2):
        model["param"][i], model["grad"][-1 - i] = model["param"][i].to(dtype), model["grad"][-1 - i].to(dtype)
    check_step(backend, model, Options())


NEAR = {"offsets": (0, 7, 2**20 - 8, 3, 512, 8192)}


def check_codes(backend, options, mean_type=torch.float32, misaligned=False):
    """A step with the prior's codes has the bits of one with what they restore to."""
    coded = with_codes(make_model("cpu", **NEAR), mean_type).to(backend.device, misaligned=misaligned)
    restored = coded.to(backend.device, misaligned=misaligned)
    restored.tensors["prior_mean"] = [m.float() for m in restored["prior_mean"]]
    counters, kl = step(coded, replace(options, codes=True), backend)
    expected = step(restored, options, backend)
    assert counters == expected[0]
    # Sums of up to four elements may be float32, and their order another where tensors fall into other launches.
    assert kl == pytest.approx(expected[1], rel=1e-8)
    for name in ("param", "mean", "std"):
        assert all(torch.equal(a, b) for a, b in zip(coded[name], restored[name], strict=True)), name


@pytest.mark.parametrize("name", [name for name, o in STEPS.items() if o.prior])
def test_a_step_with_codes_is_that_with_what_they_restore_to(backend, name):
    check_codes(backend, STEPS[name])


@ALIGNMENTS
@pytest.mark.parametrize("mean_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("found_inf", [None, 1.0])
def test_codes_beside_means_of_either_type(backend, mean_type, misaligned, found_inf):
    check_codes(backend, Options(found_inf=found_inf), mean_type, misaligned)


@pytest.mark.parametrize("cut", [1, 4, 1023, 4096])
def test_codes_of_shards_are_those_of_the_whole(backend, cut):
    whole = with_codes(make_model(backend.device, (5001,), offsets=(6,), streams=(9,)))
    parts = {
        name: [t[0].clone()] * 2 if name in CODES[2:] else [t[0][:cut].clone(), t[0][cut:].clone()]
        for name, t in whole.tensors.items()
    }
    both = Model(parts, (6, 6 + cut), (9, 9))
    for model in (whole, both):
        step(model, Options(codes=True), backend)
    for name in ("mean", "std", "param"):
        close = backend.instruction_set == "scalar"  # its compiler fuses multiplications and additions as it likes
        tolerance = {"rtol": 1e-6, "atol": 0.0} if close else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(torch.cat(both[name]), whole[name][0], **tolerance)


@pytest.mark.parametrize("wide", [False, True])
def test_codes_of_any_range_restore_the_same_bits(backend, wide):
    """All codes, of ranges from none to 2**250; a full pull towards the prior shows in the new stds."""
    n = 40 * BLOCK
    low, high = (-125.0, 125.0) if wide else (-8.0, -2.0)
    exponent = low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(0))
    exponent[: 3 * BLOCK] = -5.0
    exponent[3 * BLOCK : 4 * BLOCK] += torch.linspace(0, 1e-5, BLOCK)
    kept = LogCodes.encode(torch.exp2(exponent))
    assert kept.codes.unique().numel() == 256
    assert (kept.step[:3] == 0).all()
    restored, zeros = kept.decode(), torch.zeros(n)
    std = restored * 1.25
    lists = {name: zeros for name in ("param", "grad", "mean", "prior_mean")} | {"std": std}
    lists |= {"prior_std": restored, "prior_codes": kept.codes, "prior_low": kept.low, "prior_step": kept.step}
    models = [Model({name: [t.clone().to(backend.device)] for name, t in lists.items()}, (0,), (0,)) for _ in range(2)]
    free = {"max_mean_step": math.inf, "max_log_std_step": math.inf, "max_std": math.inf}
    for model, codes in zip(models, (True, False), strict=True):
        counters, _ = step(model, Options(codes=codes, kl_weight=1.0, **free), backend)
        assert counters[2] == 0
    assert torch.equal(models[0]["std"][0], models[1]["std"][0])
    # A difference that is no normal number counts as zero on GPUs.
    there = std - restored >= torch.finfo(torch.float32).tiny
    assert there.sum() > 0.98 * n
    assert (models[0]["std"][0].cpu()[there] < restored[there] * 1.2).all()


def test_a_step_with_the_priors_codes(backend):
    check_step(backend, with_codes(make_model("cpu", **NEAR)), Options(codes=True))


@pytest.mark.parametrize("statistics", ["sums", "sums, first sample", "pair"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_accumulate(backend, antithetic, statistics):
    if statistics == "pair" and not antithetic:
        pytest.skip("a pair is antithetic")
    before = make_model("cpu", grad=torch.bfloat16)
    if statistics == "sums, first sample":  # what an update may leave counts for nothing
        for t in before["m1"] + before["m2"]:
            t[1::2] = math.nan
    exact, ours = before.to(dtype=torch.float64), before.to(backend.device)

    counters = (7, int(statistics == "sums"), 0)
    options = Options(
        pair=statistics == "pair", antithetic=antithetic, grad_scale=2.0, found_inf=0.0, counters=counters
    )
    for counted in (accumulate(exact, options), accumulate(ours, options, backend)):
        assert counted == [8, 1 + (statistics == "sums"), 0]
    for i, grad in enumerate(before["grad"]):
        old, new = (normals(before, i, d, antithetic) for d in (7, 8))
        grad, std = 0.5 * grad.double().abs(), before["std"][i].double()
        largest = grad + (before["m1"][i].abs() + before["m2"][i].abs() if statistics == "sums" else 0.0)
        if statistics != "sums":
            assert torch.equal(ours["m1"][i].cpu(), before["grad"][i].float() / 2)
        assert_close([ours["m1"][i]], [exact["m1"][i]], [ROUNDING * largest], "m1")
        allowed = grad * error_of_normals(old) + ROUNDING * (1 + old.abs()) * largest
        assert_close([ours["m2"][i]], [exact["m2"][i]], [allowed], "m2")
        allowed = std * error_of_normals(new) + ROUNDING * (before["mean"][i].abs() + std * new.abs())
        assert_close([ours["param"][i]], [exact["param"][i]], [allowed], "param")


@ALIGNMENTS
@TYPES
@pytest.mark.parametrize("sizes", [SIZES, (2**17 + 101,)], ids=["several", "large"])
def test_the_second_sample_of_a_pair(backend, sizes, param, grad, stochastic, misaligned):
    """It may be made of the first one; the bits are those that a draw of it has."""
    before = make_model("cpu", sizes, param=param, grad=grad)
    ours = before.to(backend.device, misaligned=misaligned)
    sample(ours, (6, 0, 0), True, stochastic, backend)
    drawn = ours.to(backend.device, misaligned=misaligned)
    sample(drawn, (7, 0, 0), True, stochastic, backend)
    options = Options(pair=True, antithetic=True, stochastic_rounding=stochastic, counters=(6, 0, 0))
    assert accumulate(ours, options, backend) == [7, 1, 0]
    for i, (mean, std) in enumerate(zip(before["mean"], before["std"], strict=True)):
        assert torch.equal(ours["param"][i], drawn["param"][i])
        assert torch.equal(ours["m1"][i].cpu(), before["grad"][i].float())
        mean, std, eps = mean.double(), std.double(), normals(before, i, 7, True)
        theta, partner = mean + std * eps, mean - std * eps
        # Of the product std * eps, of the sample and of its mirror image: half a unit in the last place each.
        rounding = 2.0**-24 * (std * eps.abs() + partner.abs() + theta.abs())
        allowed = std * error_of_normals(eps) + rounding + error_of_store(theta, param, stochastic)
        assert_close([ours["param"][i]], [theta], [1.0001 * allowed], "param")


def check_gauss_newton(backend, before, o, misaligned=False):
    """One Gauss-Newton update of ``before`` by a backend: std, sample and counters; returns the update's tensors."""
    exact, ours = before.to(dtype=torch.float64), before.to(backend.device, misaligned=misaligned)
    assert gauss_newton(ours, o, backend) == gauss_newton(exact, o)
    stds, params = [], []
    for i, (mean, old, grad) in enumerate(zip(*(before[n] for n in ("mean", "std", "grad")), strict=True)):
        std, t2 = exact["std"][i], o.evidence * (grad.double() / (o.grad_scale or 1.0) * old.double()) ** 2
        # d log std / d log t = -t**2 / (1 + t**2); a float32 std has a rounding of its own.
        sensitivity = torch.where(t2.isfinite(), t2 / (1 + t2), 1.0)
        stds.append(std * ROUNDING * (1 + sensitivity))
        eps = normals(before, i, o.counters[0] + 1, o.antithetic)
        theta = stds[-1] * eps.abs() + std * error_of_normals(eps) + ROUNDING * (mean.abs() + std * eps.abs())
        value, dtype = exact["param"][i], before["param"][i].dtype
        params.append(theta + error_of_store(value, dtype, o.stochastic_rounding))
    assert_close(ours["std"], exact["std"], stds, "std")
    assert_close(ours["param"], exact["param"], params, "param")
    for name in ("mean", "grad"):
        for a, b in zip(ours[name], before[name], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
    return ours


GAUSS_NEWTONS = {
    "plain": Options(),
    "antithetic, first of a pair": Options(antithetic=True, counters=(4, 0, 0)),
    "antithetic, second of a pair": Options(antithetic=True, counters=(5, 0, 0)),
    "after accumulated samples": Options(counters=(5, 2, 0)),
    "draw beyond 32 bits": Options(counters=(2**32 - 1, 0, 0)),
    "refused before": Options(counters=(5, 0, 1)),
    "grad_scale": Options(grad_scale=65536.0, found_inf=0.0, evidence=1e12),
    "no evidence": Options(evidence=0.0),
    "little evidence": Options(evidence=1e-3),
    "overwhelming evidence": Options(evidence=1e30),
}


@pytest.mark.parametrize("options", GAUSS_NEWTONS.values(), ids=GAUSS_NEWTONS)
def test_gauss_newton(backend, options):
    check_gauss_newton(backend, make_model("cpu"), options)


@ALIGNMENTS
@TYPES
def test_gauss_newton_in_every_type(backend, param, grad, stochastic, misaligned):
    model = make_model("cpu", param=param, grad=grad)
    check_gauss_newton(backend, model, Options(stochastic_rounding=stochastic), misaligned)


def test_gauss_newton_of_many_types_in_one_call(backend):
    model = make_model("cpu")
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16) * 2):
        model["param"][i], model["grad"][-1 - i] = model["param"][i].to(dtype), model["grad"][-1 - i].to(dtype)
    check_gauss_newton(backend, model, Options())


def posterior_of(std, grad):
    """A model of one tensor with these stds and gradients, and means of one: no sample is subnormal, as GPUs flush."""
    tensors = {"param": [torch.zeros_like(std)], "mean": [torch.ones_like(std)], "std": [std], "grad": [grad]}
    return Model(tensors, (0,), (0,))


@pytest.mark.parametrize("evidence", [1.0, 1e6])
def test_gauss_newton_over_the_whole_range_of_floats(backend, evidence):
    largest, smallest = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    grads = torch.cat([torch.logspace(-37, 38, 301), torch.tensor([0.0, largest])])
    stds = torch.tensor([smallest, 1e-30, 1e-8, 0.05, 3.0, 1e8])
    std, grad = (t.flatten() for t in torch.meshgrid(stds, grads, indexing="ij"))
    grad = grad * (1 - 2 * (torch.arange(len(grad)) % 2))
    t = grad.double().abs() * std.double() * evidence**0.5
    # Where the bound of 2**126 is crossed is a matter of rounding.
    clear = (t / 2.0**126 - 1).abs() > 1e-6
    before = posterior_of(std[clear], grad[clear])
    after = check_gauss_newton(backend, before, Options(evidence=evidence))["std"][0].cpu()
    t, std = t[clear], std[clear]
    refused = t > 2.0**126
    assert 0 < refused.sum() < len(t) / 4
    assert torch.equal(after[refused], std[refused])
    # Written as precisions, which float64 holds: 1 / std**2 + evidence * g**2.
    precision = std.double() ** -2 + evidence * grad[clear].double() ** 2
    expected = (precision**-0.5).clamp(min=smallest)
    torch.testing.assert_close(after[~refused].double(), expected[~refused], rtol=2 * ROUNDING, atol=0)
    assert (after <= std).all()
    assert (after >= smallest).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gauss_newton_of_every_16_bit_gradient(backend, dtype):
    grad = torch.arange(-(2**15), 2**15).short().view(dtype)
    # So much evidence that float16's smallest subnormal number counts.
    before = posterior_of(torch.full(grad.shape, 0.05), grad)
    after = check_gauss_newton(backend, before, Options(evidence=1e18))["std"][0].cpu()
    size, kept = grad.double().abs(), after == torch.tensor(0.05)
    assert kept[~grad.isfinite() | (size > 2e30) | (size == 0)].all()
    assert not kept[(size > 5e-8) & (size < 1e30)].any()


@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_gauss_newton_draws_what_sample_draws(backend, param):
    model = make_model(backend.device, param=param)
    options = Options(stochastic_rounding=param == torch.bfloat16)
    counters = gauss_newton(model, options, backend)
    drawn = model.to(backend.device)
    sample(drawn, counters, stochastic_rounding=options.stochastic_rounding, backend=backend)
    assert counters == [options.counters[0] + 1, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(model["param"], drawn["param"], strict=True))


@pytest.mark.parametrize("cut", [1, 4, 1023, 4096])
def test_gauss_newton_of_shards_is_that_of_the_whole(backend, cut):
    whole = make_model(backend.device, (5001,), offsets=(6,), streams=(9,))
    parts = {name: [t[0][:cut].clone(), t[0][cut:].clone()] for name, t in whole.tensors.items()}
    both = Model(parts, (6, 6 + cut), (9, 9))
    gauss_newton(whole, Options(), backend)
    gauss_newton(both, Options(), backend)
    for name in ("std", "param"):
        joined = torch.cat(both[name])
        if backend.instruction_set == "scalar":  # its compiler fuses multiplications and additions as it likes
            assert torch.allclose(joined, whole[name][0], rtol=1e-6, atol=1e-7), name
        else:
            assert torch.equal(joined, whole[name][0]), name


@pytest.mark.parametrize("n", [1, 3, 17, 512, 513])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_gauss_newton_writes_nothing_outside_a_tensor(backend, n, param):
    model = make_model(backend.device, (n + 64,), param=param)
    before = model.to(backend.device)
    inner = Model({name: [t[0][32 : 32 + n]] for name, t in model.tensors.items()}, (0,), (0,))
    gauss_newton(inner, Options(), backend)
    for name, (t,) in model.tensors.items():
        assert torch.equal(t[:32], before[name][0][:32]), name
        assert torch.equal(t[32 + n :], before[name][0][32 + n :]), name
        assert torch.equal(t, before[name][0]) == (name not in ("param", "std")), name


@ALIGNMENTS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gauss_newton_keeps_the_std_of_an_element_whose_gradient_is_not_finite(backend, value, misaligned):
    before = make_model("cpu", (100, 33))
    before["grad"][0][17] = value
    after = check_gauss_newton(backend, before, Options(), misaligned)
    changed = (after["std"][0].cpu() != before["std"][0]).nonzero().flatten().tolist()
    assert 17 not in changed
    assert len(changed) > 90
    assert gauss_newton(before.to(backend.device), Options(), backend) == [6, 0, 1]


@pytest.mark.parametrize("size", [8, 33])
def test_gauss_newton_refuses_nothing_without_need(backend, size):
    # The largest gradients that are not refused, alone in a block.
    before = posterior_of(torch.full((size,), 0.05), torch.full((size,), 3e38))
    assert gauss_newton(before.to(backend.device), Options(evidence=1.0), backend) == [6, 0, 0]


def test_gauss_newton_never_raises_a_std(backend):
    # Not even to the smallest that it makes; and with gradients that change nothing, no rounding adds up.
    before = posterior_of(torch.tensor([0.0, 0.05, 0.07, 1e-30] * 100), torch.tensor([1.0, 1e-6, 0.0, 1.0] * 100))
    model = before.to(backend.device)
    for draw in range(20):
        gauss_newton(model, Options(evidence=1.0, counters=(draw, 0, 0)), backend)
    assert torch.equal(model["std"][0].cpu(), before["std"][0])


def test_gauss_newton_changes_nothing_if_found_inf(backend):
    model = make_model(backend.device)
    model["grad"][4][7] = math.inf
    before = model.to(backend.device)
    counters = gauss_newton(model, Options(grad_scale=2.0, found_inf=1.0, counters=(5, 2, 0)), backend)
    assert counters == [5, 2, 0]
    for name, tensors in model.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)), name


def test_gauss_newton_of_empty_tensors_and_scalars(backend):
    model = make_model(backend.device, (0, 1, 0))
    tensors = {name: [t[0], t[1].reshape(()), t[2]] for name, t in model.tensors.items()}
    check_gauss_newton(backend, Model(tensors, model.offsets, model.streams).to("cpu"), Options())
    assert gauss_newton(make_model(backend.device, (0, 0)), Options(), backend) == [6, 0, 0]


@pytest.mark.parametrize("draw", [4, 5])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_updates_draw_what_sample_draws(backend, param, antithetic, draw):
    model = make_model(backend.device, param=param)
    options = Options(antithetic=antithetic, stochastic_rounding=param == torch.bfloat16, counters=(draw, 0, 0))
    counters, _ = step(model, options, backend)
    drawn = model.to(backend.device)
    sample(drawn, counters, antithetic, options.stochastic_rounding, backend)
    assert counters[0] == draw + 1
    assert all(torch.equal(a, b) for a, b in zip(model["param"], drawn["param"], strict=True))


@pytest.mark.parametrize("draw", [2, 3, 2**33 + 3])
@pytest.mark.parametrize("antithetic", [False, True])
def test_normals(backend, draw, antithetic):
    n = 100_003
    model = Model(
        {
            "param": [torch.empty(n, device=backend.device)],
            "mean": [torch.zeros(n, device=backend.device)],
            "std": [torch.ones(n, device=backend.device)],
        },
        (5,),
        (4,),
    )
    sample(model, [draw, 0, 0], antithetic, backend=backend)
    eps = normals(model, 0, draw, antithetic)
    assert_close(model["param"], [eps], [error_of_normals(eps)], "eps")


@pytest.mark.parametrize("cut", [1, 4, 1023, 4096])
def test_shards_and_split_lists_update_as_the_whole(backend, cut):
    whole = make_model(backend.device, (5001,), offsets=(6,), streams=(9,))
    parts = {name: [t[0][:cut].clone(), t[0][cut:].clone()] for name, t in whole.tensors.items()}
    both = Model(parts, (6, 6 + cut), (9, 9))
    each = [Model({name: [t[k].clone()] for name, t in parts.items()}, (both.offsets[k],), (9,)) for k in range(2)]
    _, kl = step(whole, Options(), backend)
    _, kl_of_both = step(both, Options(), backend)
    kls = [step(part, Options(), backend)[1] for part in each]
    for name in ("mean", "std", "param"):
        joined = torch.cat(both[name])
        assert torch.equal(joined, torch.cat([part[name][0] for part in each])), name
        if backend.instruction_set == "scalar":  # its compiler fuses multiplications and additions as it likes
            assert torch.allclose(joined, whole[name][0], rtol=1e-6, atol=0), name
        else:
            assert torch.equal(joined, whole[name][0]), name
    # Sums of up to four elements may be float32, and a cut may divide such a group.
    assert kl_of_both == pytest.approx(kl, rel=1e-8)
    assert sum(kls) == pytest.approx(kl, rel=1e-8)


def test_twice_the_same_bits(backend):
    models = [make_model(backend.device) for _ in range(2)]
    results = [step(model, Options(statistics=True), backend) for model in models]
    assert results[0] == results[1]
    for name, tensors in models[0].tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, models[1][name], strict=True)), name


def edge_floats():
    """float16 and bfloat16 numbers as float32, their neighbours, and the midpoints between them; infinities, NaN."""
    halves = torch.arange(-(2**15), 2**15, 17).short()
    values = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    values = values[values.isfinite()]
    halfway = (
        (values.view(torch.int32) + 0x1000).view(torch.float32),
        (values.view(torch.int32) + 0x8000).view(torch.float32),
    )
    around = torch.cat([values, *halfway])
    infinity = torch.tensor(math.inf)
    edges = torch.cat([around, torch.nextafter(around, infinity), torch.nextafter(around, -infinity)])
    special = torch.tensor([math.inf, -math.inf, math.nan, 65519.99, 65520.0, -65520.0])
    # The sample mean + 0 * eps is the mean but for subnormal numbers, which GPUs flush.
    return torch.cat([edges[(edges.abs() >= 2.0**-126) | (edges == 0)], special])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(backend, dtype):
    mean = edge_floats()
    tensors = {"param": [torch.empty_like(mean, dtype=dtype)], "mean": [mean], "std": [torch.zeros_like(mean)]}
    model = Model(tensors, (0,), (0,)).to(backend.device)
    model.tensors["param"] = [torch.empty_like(model["mean"][0], dtype=dtype)]
    sample(model, [0, 0, 0], backend=backend)
    out, expected = model["param"][0].cpu(), mean.to(dtype)
    number = ~mean.isnan()
    # mean + 0 * eps turns -0 into +0 or keeps it, by the sign of eps.
    assert torch.equal(out[number].float(), expected[number].float())
    assert out[~number].isnan().all()


def test_stochastic_rounding_is_the_references(backend):
    mean = edge_floats()
    mean = mean[mean.isfinite()]
    models = []
    for device in (backend.device, "cpu"):
        out = torch.empty_like(mean, dtype=torch.bfloat16, device=device)
        state = {"mean": [mean.to(device)], "std": [torch.zeros_like(mean, device=device)]}
        models.append(Model({"param": [out], **state}, (3,), (0,)))
    sample(models[0], [4, 0, 0], stochastic_rounding=True, backend=backend)
    sample(models[1], [4, 0, 0], stochastic_rounding=True)
    out, expected = (m["param"][0].cpu().float() for m in models)
    assert torch.equal(out, expected)
    assert not torch.equal(out, mean.bfloat16().float())


def first_statistic(grad, backend):
    """m1 after the first sample of an update, which is the gradient as it was read."""
    zeros = {name: [torch.zeros(grad.shape, device=backend.device)] for name in ("param", "m1", "m2", "mean", "std")}
    model = Model({**zeros, "grad": [grad]}, (0,), (0,))
    accumulate(model, Options(counters=(0, 0, 0)), backend)
    return model["m1"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_read_exactly(backend, dtype):
    grad = torch.arange(-(2**15), 2**15).short().view(dtype).to(backend.device)
    m1 = first_statistic(grad, backend)
    number = ~grad.isnan()
    exact = grad.float()
    if backend.name in ("cuda", "triton"):
        # bfloat16's subnormal numbers may be flushed; float16's are normal in float32.
        number &= (exact.abs() >= 2.0**-126) | (exact == 0)
    assert torch.equal(m1[number], exact[number])
    assert m1[grad.isnan()].isnan().all()


def test_float16_gradients_keep_their_digits_where_subnormal_floats_count_as_zero(backend):
    # As in the CUDA kernels, which share their source with the CPU's, and wherever a user sets this mode.
    grad = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    grad = grad[grad.isfinite()].to(backend.device)
    exact = grad.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        m1 = first_statistic(grad, backend)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(m1, exact)


@pytest.mark.parametrize("name", ["backend", "reference"])
def test_stochastic_rounding_keeps_a_nan(backend, name):
    # GPUs make the first of them.
    words = [0x7FFFFFFF, -1, 0x7FC00000, 0x7FFF0001, -0x400000, 0x7F800001]
    mean = torch.tensor(words, dtype=torch.int32).view(torch.float32).repeat(1000).to(backend.device)
    out = torch.zeros_like(mean, dtype=torch.bfloat16)
    model = Model({"param": [out], "mean": [mean], "std": [torch.ones_like(mean)]}, (0,), (0,))
    sample(model, [4, 0, 0], stochastic_rounding=True, backend=backend if name == "backend" else None)
    assert out.isnan().all()


@pytest.mark.parametrize("statistics", [False, True])
def test_nothing_counts_as_refused_but_elements_of_the_tensor(backend, statistics):
    # Whether these gradients overflow depends on the normals; beyond the end they would be others.
    found = set()
    for stream in range(24):
        model = make_model(backend.device, (8,), offsets=(0,), streams=(stream,))
        for name, value in {"mean": 0.0, "std": 0.05, "grad": 2e38, "m1": 0.0, "m2": 0.0}.items():
            model[name][0].fill_(value)
        before = model.to(backend.device)
        options = Options(loss_scale=1.9, prior=False, statistics=statistics, counters=(0, int(statistics), 0))
        counters, _ = step(model, options, backend)
        kept = (model["std"][0] == before["std"][0]) & (model["mean"][0] == before["mean"][0])
        assert counters[2] == kept.any(), stream
        found.add(counters[2])
    assert found == {0, 1}


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("prior_mean", [0.0, 1.0])
def test_the_pull_towards_the_prior_is_exact_at_both_ends(backend, prior_mean, bounded):
    ratio = torch.logspace(-5, 5, 201)
    prior_std = torch.full_like(ratio, 0.01)
    std = (ratio * prior_std).float()
    mean = torch.full_like(ratio, 1.0 - prior_mean)
    zeros = torch.zeros_like(ratio)
    tensors = {
        "mean": mean,
        "std": std,
        "prior_mean": torch.full_like(ratio, prior_mean),
        "prior_std": prior_std,
        "grad": zeros,
        "param": zeros,
    }
    model = Model({name: [t.clone().to(backend.device)] for name, t in tensors.items()}, (0,), (0,))
    bounds = {"max_mean_step": math.inf, "max_log_std_step": math.inf, "max_std": math.inf}
    if bounded:
        bounds = {"max_mean_step": 0.1, "max_log_std_step": 0.1, "max_std": 1e6}
    step(model, Options(lr=0.5, kl_weight=0.25, **bounds), backend)
    v = 0.125 * (std.double() / prior_std.double()) ** 2
    exact = (mean.double() + v * prior_mean) / (1 + v)
    # Relative, though one of the two means is zero: two roundings of the ratio, doubled by its square, and eight.
    assert_close(model["mean"], [exact], [12 * 2.0**-24 * exact.abs()], "mean")


def test_a_posterior_at_its_prior_stays_there(backend):
    model = make_model(backend.device)
    for mine, prior in (("mean", "prior_mean"), ("std", "prior_std")):
        model.tensors[mine] = [t.clone() for t in model[prior]]
    model.tensors["grad"] = [torch.zeros_like(t) for t in model["grad"]]
    for kl_weight in (0.0, 0.1, 1.0):
        step(model, Options(kl_weight=kl_weight, max_std=math.inf), backend)
    assert all(torch.equal(a, b) for a, b in zip(model["mean"], model["prior_mean"], strict=True))


@pytest.mark.parametrize("n", [1, 3, 17, 512, 513])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_nothing_outside_a_tensor_is_written(backend, n, param):
    model = make_model(backend.device, (n + 64,), param=param)
    before = model.to(backend.device)
    inner = Model({name: [t[0][32 : 32 + n]] for name, t in model.tensors.items()}, (0,), (0,))
    step(inner, Options(statistics=True), backend)
    for name, (t,) in model.tensors.items():
        assert torch.equal(t[:32], before[name][0][:32]), name
        assert torch.equal(t[32 + n :], before[name][0][32 + n :]), name
        assert torch.equal(t, before[name][0]) == (name not in ("param", "mean", "std")), name


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_element(backend, value, bounded, statistics):
    model = make_model(backend.device, (100, 33))
    model["grad"][0][17] = value
    before = model.to(backend.device)
    bound = 0.1 if bounded else math.inf
    options = Options(statistics=statistics, loss_scale=1.0, max_mean_step=bound, max_log_std_step=bound, max_std=bound)
    counters, kl = step(model, options, backend)
    assert counters == [6, 0, 1]
    assert math.isfinite(kl)
    for name in ("mean", "std"):
        changed = (model[name][0] != before[name][0]).nonzero().flatten().tolist()
        assert 17 not in changed
        assert len(changed) > 90


@pytest.mark.parametrize("bound", [0.1, math.inf])
def test_found_inf_changes_nothing(backend, bound):
    model = make_model(backend.device)
    model["grad"][4][7] = math.inf
    before = model.to(backend.device)
    bounds = {"max_mean_step": bound, "max_log_std_step": bound, "max_std": bound}
    counters, kl = step(model, Options(statistics=True, found_inf=1.0, counters=(5, 2, 0), **bounds), backend)
    assert counters == [5, 2, 0]
    for name, tensors in model.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)), name
    exact = before.to("cpu", torch.float64)
    lists = zip(*(exact[n] for n in ("mean", "std", "prior_mean", "prior_std")), strict=True)
    assert kl == pytest.approx(sum(kl_terms(*t)[0].sum().item() for t in lists), rel=1e-5)


@pytest.mark.parametrize("bound", [0.1, math.inf])
def test_an_unbounded_update_keeps_std_positive(backend, bound):
    model = make_model(backend.device, (4096,))
    model["grad"][0].mul_(1e6)
    exact = model.to("cpu", torch.float64)
    options = Options(prior=False, max_mean_step=bound, max_log_std_step=bound, max_std=math.inf)
    step(model, options, backend)
    step(exact, options)
    std = model["std"][0].cpu()
    assert (std > 0).all()
    # d log std / d log eps is at most 1, and eps near zero has an absolute error.
    eps = normals(exact, 0, 5)
    relative = error_of_normals(eps) / eps.abs() + 1e-6
    assert ((std.double() / exact["std"][0]).log().abs() <= relative).all()


def kl_lists(device):
    ratio = torch.cat([torch.logspace(-3, 3, 31), 1 + torch.logspace(-6, -0.3, 15), 1 - torch.logspace(-6, -0.3, 15)])
    prior_std = torch.full_like(ratio, 0.037)
    std = (ratio.double() * 0.037).float()
    moved = torch.linspace(-2, 2, len(ratio)) * (torch.arange(len(ratio)) % 3)
    return [t.to(device) for t in (0.4 + 0.05 * moved, std, torch.full_like(ratio, 0.4), prior_std)]


def exact_kl(lists):
    mean, std, prior_mean, prior_std = ([t.cpu().double() for t in tensors] for tensors in lists)
    return reference.gaussian_kl(ops.State(mean, std, prior_mean=prior_mean, prior_std=prior_std))


def test_kl_keeps_its_digits(backend):
    lists = kl_lists(backend.device)
    n = len(lists[0])
    # One tensor per element in one call would hide an error in the sum; the step's partial sums are tested above.
    for i in range(0, n, 3):
        one = [[t[i : i + 1].clone()] for t in lists]
        kl, (grad_mean,), (grad_std,) = ops.gaussian_kl(*one, backend=backend.name)
        exact = exact_kl(one)
        assert kl.item() == pytest.approx(exact[0].item(), rel=1e-5, abs=1e-20)
        assert grad_mean.item() == pytest.approx(exact[1][0].item(), rel=1e-5, abs=1e-12)
        assert grad_std.item() == pytest.approx(exact[2][0].item(), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("misaligned", [False, True])
def test_gaussian_kl(backend, misaligned):
    model = make_model("cpu").to(backend.device, misaligned=misaligned)
    lists = [model[n] for n in ("mean", "std", "prior_mean", "prior_std")]
    kl, grad_mean, grad_std = ops.gaussian_kl(*lists, backend=backend.name)
    exact = exact_kl(lists)
    assert kl.dtype == torch.float64
    assert kl.item() == pytest.approx(exact[0].item(), rel=1e-5)
    for i, (pm, ps, m, s) in enumerate(zip(*(lists[k] for k in (2, 3, 0, 1)), strict=True)):
        pm, ps, m, s = (t.cpu().double() for t in (pm, ps, m, s))
        assert_close([grad_mean[i]], [exact[1][i]], [ROUNDING * (m.abs() + pm.abs()) / ps**2], "grad_mean")
        assert_close([grad_std[i]], [exact[2][i]], [ROUNDING * (s / ps**2 + 1 / s)], "grad_std")


def test_kl_of_a_vanishing_std_is_infinite(backend):
    zero, one = torch.zeros(8, device=backend.device), torch.ones(8, device=backend.device)
    kl, _, _ = ops.gaussian_kl([zero], [zero.clone()], [zero.clone()], [one], backend=backend.name)
    assert kl.item() == math.inf


def test_empty_tensors_and_scalars(backend):
    model = make_model(backend.device, (0, 1, 0))
    model = Model(
        {name: [t[0], t[1].reshape(()), t[2]] for name, t in model.tensors.items()}, model.offsets, model.streams
    )
    counters, kl = step(model, Options(), backend)
    assert counters == [6, 0, 0]
    assert math.isfinite(kl)
    nothing = make_model(backend.device, (0, 0))
    assert step(nothing, Options(), backend) == ([6, 0, 0], 0.0)


def test_refusals_name_the_tensor_and_a_remedy(backend):
    model = make_model(backend.device, (12, 12))
    model["grad"][1] = torch.randn(24, device=backend.device)[::2]
    with pytest.raises(ValueError, match=r"grad\[1\].*not contiguous.*reference"):
        step(model, Options(), backend)
    model = make_model(backend.device, (12,))
    with pytest.raises(ValueError, match=r"mean\[0\] is torch.float64.*reference"):
        step(model.to(backend.device, torch.float64), Options(), backend)
    model["param"][0] = model["param"][0].double()
    with pytest.raises(ValueError, match=r"param\[0\] is torch.float64"):
        step(model, Options(), backend)


def test_autograd_sees_the_writes(backend):
    model = make_model(backend.device, (12,))
    versions = {name: t[0]._version for name, t in model.tensors.items()}
    step(model, Options(statistics=True), backend)
    changed = {name for name, t in model.tensors.items() if t[0]._version != versions[name]}
    assert changed == {"param", "mean", "std"}
    versions = {name: t[0]._version for name, t in model.tensors.items()}
    gauss_newton(model, Options(), backend)
    assert {name for name, t in model.tensors.items() if t[0]._version != versions[name]} == {"param", "std"}


def test_opcheck(backend):
    model = make_model(backend.device, (3, 70))
    for t in model["mean"] + model["std"]:
        t.requires_grad_()
    lists = tuple(model[n] for n in ("mean", "std", "prior_mean", "prior_std"))
    torch.library.opcheck(ops.gaussian_kl.default, lists, {"backend": backend.name})
    model = make_model(backend.device, (3, 70))
    counters = torch.tensor([1, 0, 0], device=backend.device)
    arguments = (model["param"], model["mean"], model["std"], [0, 0], [0, 1], 1, counters, False, False)
    torch.library.opcheck(torch.ops.distruction.sample.default, arguments, {"backend": backend.name})
    lists = (model[n] for n in ("param", "std", "grad", "mean"))
    arguments = (*lists, 10.0, [0, 0], [0, 1], 1, counters, False, False)
    torch.library.opcheck(torch.ops.distruction.gauss_newton.default, arguments, {"backend": backend.name})
