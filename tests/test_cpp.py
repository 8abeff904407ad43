"""The C++ kernels: what is theirs alone, for every instruction set; the matrix of backends is in test_ops_matrix."""

import math

import pytest
import torch

from distruction.ops import backends, reference
from distruction.ops.reference.philox import philox

if backends.unavailable("cpp", "cpu") is not None:
    pytest.skip(backends.unavailable("cpp", "cpu"), allow_module_level=True)

from distruction import ops
from distruction.ops import cpp

USABLE = [name for name, (_, usable) in cpp.instruction_sets().items() if usable]
SIZES = (1, 2, 3, 5, 64, 1000, 8193, 20001)
OFFSETS = (0, 1, 2, 3, 7, 0, 513, 8191)
STREAMS = (0, 2**32 - 1, 5, 6, 7, 8, 9, 10)


@pytest.fixture(params=cpp.instruction_sets())
def instruction_set(request, monkeypatch):
    if request.param not in USABLE:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(cpp.ENVIRONMENT, request.param)
    return request.param


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_model(sizes=SIZES, *, param=torch.float32, grad=torch.float32, seed=0, misaligned=False):
    """Lists of tensors by name, the posterior near its prior; misaligned ones start 4 bytes (2 in 16 bit) off."""
    generator = torch.Generator().manual_seed(seed)

    def draw(function):
        tensors = []
        for n in sizes:
            x = function(torch.randn(n + 1, generator=generator))
            tensors.append(x[1:] if misaligned else x[:n].clone())
        return tensors

    prior_std = draw(lambda x: 0.05 * torch.exp(0.5 * x))
    prior_mean = draw(lambda x: x)
    moved = draw(lambda x: x)
    return {
        "param": draw(lambda x: x.to(param)),
        "grad": draw(lambda x: x.to(grad)),
        "mean": [m + s * d for m, s, d in zip(prior_mean, prior_std, moved, strict=True)]
        if not misaligned
        else draw(lambda x: x),
        "std": draw(lambda x: 0.05 * torch.exp(0.5 * x)),
        "m1": draw(lambda x: x),
        "m2": draw(lambda x: x),
        "prior_mean": prior_mean,
        "prior_std": prior_std,
    }


def copy_of(model, dtype):
    return {
        name: [t.clone() if name in ("param", "grad") else t.to(dtype, copy=True) for t in tensors]
        for name, tensors in model.items()
    }


def run_step(backend, model, *, statistics=True, prior=True, counters=None, found_inf=None, grad_scale=None, **options):
    counters = torch.tensor([5, 2 if statistics else 0, 0]) if counters is None else counters
    arguments = {
        "lr": torch.tensor(0.3),
        "kl_weight": torch.tensor(0.1),
        "loss_scale": 50.0,
        "offsets": OFFSETS[: len(model["mean"])],
        "streams": STREAMS[: len(model["mean"])],
        "seed": -77,
        "counters": counters,
        "antithetic": False,
        "stochastic_rounding": False,
        "max_mean_step": 0.1,
        "max_log_std_step": 0.1,
        "max_std": 0.1,
        "learn_mean": True,
        "learn_std": True,
    }
    return counters, backend.step(
        model["param"],
        model["mean"],
        model["std"],
        model["grad"],
        model["m1"] if statistics else [],
        model["m2"] if statistics else [],
        model["prior_mean"] if prior else [],
        model["prior_std"] if prior else [],
        **(arguments | options),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def largest_error(tensors, exact):
    return max((t.double() - e).abs().max().item() for t, e in zip(tensors, exact, strict=True))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(instruction_set, counter, key, expected):
    block = counter[0] | counter[1] << 32
    words = cpp.words(block, 1, draw=counter[2], stream=counter[3], seed=key)
    assert words[0].tolist() == list(expected)


def test_words_cross_the_counters_carry(instruction_set):
    first, n = 2**32 - 37, 1001
    block = torch.arange(first, first + n)
    expected = philox((block & 0xFFFFFFFF, block >> 32, torch.tensor(7), torch.tensor(0xFFFFFFF0)), -1)
    words = cpp.words(first, n, draw=7, stream=0xFFFFFFF0, seed=-1)
    assert torch.equal(words, torch.stack(expected, dim=1))


@pytest.mark.parametrize("antithetic", [False, True])
def test_normals(instruction_set, antithetic):
    n = 1_000_003
    zero, one, counters = torch.zeros(n), torch.ones(n), torch.tensor([2**33 + 3, 0, 0])
    out, exact = torch.empty(n), torch.empty(n, dtype=torch.float64)
    cpp.sample([out], [zero], [one], [5], [4], 123, counters, antithetic, False)
    reference.sample([exact], [zero.double()], [one.double()], [5], [4], 123, counters, antithetic, False)
    # The contract asks for 4e-6.
    assert ((out.double() - exact).abs() / exact.abs().clamp(min=1)).max() <= 1e-6


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("draw", [4, 5])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_draw_what_sample_draws(instruction_set, antithetic, draw, param):
    # An antithetic pair reuses its normals between an update's two draws.
    stochastic = param == torch.bfloat16
    generator = (OFFSETS, STREAMS, -77)
    for op in ("step", "accumulate"):
        model, counters = make_model(param=param), torch.tensor([draw, 0, 0])
        if op == "step":
            run_step(cpp, model, counters=counters, antithetic=antithetic, stochastic_rounding=stochastic)
        else:
            lists = [model[name] for name in ("param", "m1", "m2", "grad", "mean", "std")]
            cpp.accumulate(*lists, *generator, counters, antithetic, stochastic, None, None)
        expected = [torch.empty_like(p) for p in model["param"]]
        assert counters[0] == draw + 1
        cpp.sample(expected, model["mean"], model["std"], *generator, counters, antithetic, stochastic)
        assert all(torch.equal(a, b) for a, b in zip(model["param"], expected, strict=True))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
def test_step(instruction_set, prior, statistics, misaligned, grad):
    model = make_model(grad=grad, misaligned=misaligned)
    exact, single, ours = copy_of(model, torch.float64), copy_of(model, torch.float32), model
    options = {"statistics": statistics, "prior": prior, "grad_scale": torch.tensor(3.0)}
    _, exact_kl = run_step(reference, exact, **options)
    counters, _ = run_step(reference, single, **options)
    our_counters, kl = run_step(cpp, ours, **options)
    assert our_counters.tolist() == counters.tolist() == [6, 0, 0]
    assert kl.item() == pytest.approx(exact_kl.item(), rel=1e-6)
    for name in ("mean", "std", "param"):
        # Rounding may differ from the reference's in float32, but not be worse than a small multiple of it.
        allowed = 2 * largest_error(single[name], exact[name]) + 1e-7
        assert largest_error(ours[name], exact[name]) <= allowed, name
    for name in ("m1", "m2") if statistics else ():
        assert all(not t.any() for t in ours[name])


def test_accumulate(instruction_set):
    model = make_model()
    exact, single = copy_of(model, torch.float64), copy_of(model, torch.float32)

    def run(backend, m):
        counters = torch.tensor([7, 1, 0])
        names = ("param", "m1", "m2", "grad", "mean", "std")
        lists = [m[name] for name in names]
        backend.accumulate(*lists, OFFSETS, STREAMS, 3, counters, True, False, torch.tensor(2.0), torch.tensor(0.0))
        assert counters.tolist() == [8, 2, 0]

    run(reference, exact)
    run(reference, single)
    run(cpp, model)
    for name in ("m1", "m2", "param"):
        assert largest_error(model[name], exact[name]) <= 2 * largest_error(single[name], exact[name]) + 1e-7, name


def test_result_does_not_depend_on_threads_or_their_pool(instruction_set, monkeypatch):
    results = []
    before = torch.get_num_threads()
    for threads, own_pool in ((1, False), (2, False), (2, True), (7, True)):
        torch.set_num_threads(threads)
        with monkeypatch.context() as patch:
            if own_pool:
                patch.setattr(cpp, "_parallel_for", lambda: None)
            model = make_model()
            _, kl = run_step(cpp, model)
            results.append([kl, *(t for tensors in model.values() for t in tensors)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("cut", [1, 4, 1023, 8192])
def test_shards_update_as_the_whole(instruction_set, cut):
    whole = make_model((20_001,))
    shards = {name: [t[0][:cut].clone(), t[0][cut:].clone()] for name, t in whole.items()}
    _, kl = run_step(cpp, whole, offsets=[6], streams=[9])
    _, kl_of_shards = run_step(cpp, shards, offsets=[6, 6 + cut], streams=[9, 9])
    for name in ("mean", "std", "param"):
        joined = torch.cat(shards[name])
        if instruction_set == "scalar":
            assert torch.allclose(joined, whole[name][0], rtol=1e-6, atol=0)
        else:
            assert torch.equal(joined, whole[name][0]), name
    assert kl_of_shards.item() == pytest.approx(kl.item(), rel=1e-12)


def edge_floats():
    """Every float16 and bfloat16 number as float32, their neighbours, and the midpoints between them."""
    halves = torch.arange(-(2**15), 2**15).short()
    values = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    values = values[values.isfinite()].sort().values
    midpoints = (values[1:].double() + values[:-1].double()).div(2).float()
    around = torch.cat([values, midpoints])
    infinity = torch.tensor(math.inf)
    edges = torch.cat([around, torch.nextafter(around, infinity), torch.nextafter(around, -infinity)])
    return torch.cat([edges, torch.tensor([math.inf, -math.inf, math.nan, 65519.99, 65520.0, -65520.0])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(instruction_set, dtype):
    mean = edge_floats()
    out, std = torch.empty_like(mean, dtype=dtype), torch.zeros_like(mean)
    cpp.sample([out], [mean], [std], [0], [0], 1, torch.zeros(3, dtype=torch.int64), False, False)
    expected = mean.to(dtype)
    number = ~mean.isnan()
    # mean + 0 * eps turns -0 into +0 or keeps it, by the sign of eps.
    assert torch.equal(out[number].float(), expected[number].float())
    assert out[~number].isnan().all()


def test_stochastic_rounding_is_the_references(instruction_set):
    mean = edge_floats()
    mean = mean[mean.isfinite()]
    std, counters = torch.zeros_like(mean), torch.tensor([4, 0, 0])
    out, expected = torch.empty_like(mean, dtype=torch.bfloat16), torch.empty_like(mean, dtype=torch.bfloat16)
    for backend, o in ((cpp, out), (reference, expected)):
        backend.sample([o], [mean], [std], [3], [0], 1, counters, False, True)
    assert torch.equal(out.float(), expected.float())
    assert not torch.equal(out.float(), mean.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_read_exactly(instruction_set, dtype):
    grad = torch.arange(-(2**15), 2**15).short().view(dtype)
    zeros = [torch.zeros(grad.shape) for _ in range(5)]
    param, m1, m2, mean, std = zeros
    counters = torch.zeros(3, dtype=torch.int64)
    cpp.accumulate([param], [m1], [m2], [grad], [mean], [std], [0], [0], 1, counters, False, False, None, None)
    number = ~grad.isnan()
    assert torch.equal(m1[number], grad[number].float())
    assert m1[~number].isnan().all()


@pytest.mark.parametrize("n", [1, 3, 15, 17, 511, 513])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
def test_nothing_outside_a_tensor_is_written(instruction_set, n, param):
    model = make_model((n + 64,), param=param)
    before = copy_of(model, torch.float32)
    inner = {name: [t[0][32 : 32 + n]] for name, t in model.items()}
    run_step(cpp, inner)
    for name, (t,) in model.items():
        assert torch.equal(t[:32], before[name][0][:32])
        assert torch.equal(t[32 + n :], before[name][0][32 + n :])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_element(instruction_set, value):
    model = make_model((100,))
    model["grad"][0][17] = value
    before = copy_of(model, torch.float32)
    counters, _ = run_step(cpp, model)
    assert counters.tolist() == [6, 0, 1]
    for name in ("mean", "std"):
        changed = (model[name][0] != before[name][0]).nonzero().flatten().tolist()
        assert 17 not in changed
        assert len(changed) > 90


def test_found_inf_changes_nothing(instruction_set):
    model = make_model()
    before = copy_of(model, torch.float32)
    counters, kl = run_step(cpp, model, found_inf=torch.tensor(1.0))
    assert counters.tolist() == [5, 2, 0]
    for name, tensors in model.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)), name
    lists = (before["mean"], before["std"], before["prior_mean"], before["prior_std"])
    exact, _, _ = reference.gaussian_kl(*([t.double() for t in tensors] for tensors in lists))
    assert kl.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("bound", [0.1, math.inf])
def test_an_unbounded_update_keeps_std_positive(instruction_set, bound):
    model = make_model((4096,))
    model["grad"][0].mul_(1e6)
    exact = copy_of(model, torch.float64)
    options = {"prior": False, "max_mean_step": bound, "max_log_std_step": bound, "max_std": math.inf}
    run_step(cpp, model, **options)
    run_step(reference, exact, **options)
    assert (model["std"][0] > 0).all()
    assert ((model["std"][0].double() / exact["std"][0]).log().abs() < 2e-6).all()


def test_kl_keeps_its_digits(instruction_set):
    ratio = torch.cat(
        [torch.logspace(-3, 3, 4001), 1 + torch.logspace(-7, -0.3, 2000), 1 - torch.logspace(-7, -0.3, 2000)]
    )
    prior_std = torch.full_like(ratio, 0.037)
    std, zero = (ratio.double() * 0.037).float(), torch.zeros_like(ratio)
    grad_std = torch.empty_like(ratio)
    for i in range(0, len(ratio), 997):
        one = slice(i, i + 1)
        lists = ([zero[one]], [std[one]], [zero[one]], [prior_std[one]])
        kl, _, (grad_std,) = cpp.gaussian_kl(*lists)
        exact, _, (exact_grad,) = reference.gaussian_kl(*([t.double() for t in tensors] for tensors in lists))
        assert kl.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-20)
        assert grad_std.item() == pytest.approx(exact_grad.item(), rel=1e-5, abs=1e-12)


def test_kl_of_a_vanishing_std_is_infinite(instruction_set):
    kl, _, _ = cpp.gaussian_kl([torch.zeros(5)], [torch.zeros(5)], [torch.zeros(5)], [torch.ones(5)])
    assert kl.item() == math.inf


def test_empty_tensors_and_scalars(instruction_set):
    model = make_model((0, 1, 0))
    model = {name: [t[0], t[1].reshape(()), t[2]] for name, t in model.items()}
    counters, kl = run_step(cpp, model)
    assert counters.tolist() == [6, 0, 0]
    assert math.isfinite(kl.item())


def test_refusals_name_the_tensor_and_a_remedy():
    model = make_model((12, 12))
    model["grad"][1] = torch.randn(24)[::2]
    with pytest.raises(ValueError, match=r"grad\[1\].*not contiguous.*reference"):
        run_step(cpp, model)
    model = make_model((12,))
    with pytest.raises(ValueError, match=r"mean\[0\] is torch.float64.*reference"):
        run_step(cpp, copy_of(model, torch.float64))
    model["param"][0] = model["param"][0].double()
    with pytest.raises(ValueError, match=r"param\[0\] is torch.float64"):
        run_step(cpp, model)


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices(monkeypatch):
    monkeypatch.setenv(cpp.ENVIRONMENT, "mmx")
    with pytest.raises(ValueError, match=r"mmx.*scalar"):
        run_step(cpp, make_model((4,)))


def test_autograd_sees_the_writes():
    model = make_model((12,))
    versions = {name: t[0]._version for name, t in model.items()}
    run_step(cpp, model)
    changed = {name for name, t in model.items() if t[0]._version != versions[name]}
    assert changed == {"param", "mean", "std", "m1", "m2"}


def test_auto_takes_the_kernels_for_cpu_tensors(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    assert backends.resolve("auto", "cpu") is cpp


def test_opcheck():
    m = make_model((3, 70))
    for t in m["mean"] + m["std"]:
        t.requires_grad_()
    kl = torch.ops.distruction.gaussian_kl.default
    torch.library.opcheck(kl, (m["mean"], m["std"], m["prior_mean"], m["prior_std"]), {"backend": "cpp"})
    m = make_model((3, 70))
    torch.library.opcheck(
        ops.sample.default,
        (m["param"], m["mean"], m["std"], [0, 0], [0, 1], 1, torch.tensor([1, 0, 0]), False, False),
        {"backend": "cpp"},
    )
