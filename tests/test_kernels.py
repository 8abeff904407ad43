"""What is Triton's own: its generator word by word, tables, chunks, CUDA graphs, whole trajectories."""

import math
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from workloads import (
    Options,
    accumulate,
    amp_of,
    draws_of,
    gauss_newton,
    make_model,
    normals,
    rule_of,
    sample,
    state_of,
    step,
    with_codes,
)

import distruction
from distruction import ops
from distruction.ops import backends
from distruction.ops.reference.philox import philox as reference_philox

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from backends import Backend

from distruction import kernels
from distruction.kernels import multi_tensor, philox, tables
from distruction.kernels.sample import sample_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Backend("triton", DEVICE)

pytestmark = [
    pytest.mark.skipif(TRITON.unavailable() is not None, reason=str(TRITON.unavailable())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


# --- the generator ----------------------------------------------------------------------------------


@triton.jit
def words_kernel(counters, out, keys, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1, c2, c3 = philox.philox(
        tl.load(counters + i).to(tl.uint32),
        tl.load(counters + N + i).to(tl.uint32),
        tl.load(counters + 2 * N + i).to(tl.uint32),
        tl.load(counters + 3 * N + i).to(tl.uint32),
        keys,
    )
    tl.store(out + i, c0.to(tl.int64))
    tl.store(out + N + i, c1.to(tl.int64))
    tl.store(out + 2 * N + i, c2.to(tl.int64))
    tl.store(out + 3 * N + i, c3.to(tl.int64))


@triton.jit
def normals_kernel(radius_words, angle_words, uniforms, cosines, sines, N: tl.constexpr, TARGET: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    radius_word = tl.load(radius_words + i).to(tl.uint32)
    zero = (tl.program_id(0) * 0).to(tl.uint32)
    cosine, sine = philox.box_muller(radius_word, tl.load(angle_words + i).to(tl.uint32), zero, TARGET)
    tl.store(uniforms + i, philox.uniform(radius_word))
    tl.store(cosines + i, cosine)
    tl.store(sines + i, sine)


# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, answer):
    counters = torch.tensor([int(w, 16) for w in counter.split()], device=DEVICE).repeat_interleave(4)
    low, high = (int(w, 16) for w in key.split())
    out = torch.empty(16, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](counters, out, tuple(tables.key_schedule(low | high << 32).values()), N=4)
    assert [f"{w:08x}" for w in out[::4].tolist()] == answer.split()


def our_normals(radius_words, angle_words):
    """Uniforms, cosines and sines of the kernels' generator; judged in test_normals."""
    # The interpreter's time goes by the number of programs.
    block = 2**16 if tables.INTERPRETED else 1024
    n = block * math.ceil(len(radius_words) / block)
    words = [torch.nn.functional.pad(w, (0, n - len(w))).to(DEVICE) for w in (radius_words, angle_words)]
    out = [torch.empty(n, device=DEVICE) for _ in range(3)]
    normals_kernel[(n // block,)](*words, *out, N=block, TARGET=tables.TARGET)
    return [t[: len(radius_words)].cpu() for t in out]


def test_words_are_the_references_bit_for_bit():
    n = 1024
    counters = torch.randint(2**32, (4, n), generator=torch.Generator().manual_seed(0))
    out = torch.empty(4, n, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](counters.to(DEVICE), out, tuple(tables.key_schedule(-77).values()), N=n)
    assert torch.equal(out.cpu(), torch.stack(reference_philox(tuple(counters), -77)))


@triton.jit
def log2_at_its_bound(x, TARGET: tl.constexpr):
    exact = tl.log2(x)
    return tl.where((x > 0.5) & (x < 2.0), exact + 2.384185791015625e-07, exact * 1.0000002384185791)


@triton.jit
def log2_at_its_other_bound(x, TARGET: tl.constexpr):
    exact = tl.log2(x)
    return tl.where((x > 0.5) & (x < 2.0), exact - 2.384185791015625e-07, exact * 0.9999997615814209)


@triton.jit
def square_root_at_its_bound(x, TARGET: tl.constexpr):
    return tl.sqrt(x) * 1.0000001788139343


def let_the_hardware_err(logarithm, monkeypatch):
    """Put the hardware's functions at the bounds of their errors, the logarithm "high" or "low"; "" for exact ones."""
    if logarithm:
        if not tables.INTERPRETED:
            pytest.skip("compiled kernels use the hardware's functions")
        monkeypatch.setattr(philox, "log2", log2_at_its_bound if logarithm == "high" else log2_at_its_other_bound)
        monkeypatch.setattr(philox, "square_root", square_root_at_its_bound)


# --- chunks and tables -------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "most_iterations"), [(512, 1), (512, 4), (1024, 2)])
def test_bits_do_not_depend_on_block_or_chunk(monkeypatch, block, most_iterations):
    offsets = {"offsets": (0, 5), "streams": (1, 2)}
    plain, other = (make_model(DEVICE, (4096, 3001), **offsets) for _ in range(2))
    _, kl = step(plain, Options(), TRITON)
    monkeypatch.setattr(tables, "BLOCK", block)
    monkeypatch.setattr(tables, "FEWEST_PROGRAMS", 1)
    monkeypatch.setattr(tables, "MOST_ITERATIONS", most_iterations)
    tables._launches.cache_clear()
    _, other_kl = step(other, Options(), TRITON)
    tables._launches.cache_clear()
    for name, tensors in plain.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, other[name], strict=True)), name
    assert other_kl == pytest.approx(kl, rel=1e-12)


def planned(model):
    arrays = {name: model[name] for name in ("mean", "std", "param")}
    return tables.launches(arrays, [model["grad"]], draws_of(model, (0, 0, 0)))


def test_one_launch_for_each_type_and_one_for_what_is_not_aligned():
    aligned = make_model(DEVICE, (64, 0, 1000, 8), offsets=(0, 0, 4, 0))
    assert [launch.tensors for launch, _ in planned(aligned)] == [(0, 2, 3)]
    mixed = make_model(DEVICE, (64, 64, 66), offsets=(0, 4, 0))
    mixed["param"][1] = mixed["param"][1].bfloat16()
    assert [(launch.tensors, launch.aligned) for launch, _ in planned(mixed)] == [
        ((0,), True),
        ((1,), True),
        ((2,), False),
    ]


def test_tables_are_built_once_while_the_addresses_hold():
    model = make_model(DEVICE, (64, 32), offsets=(0, 4))
    ((_, first),) = planned(model)
    ((_, again),) = planned(model)
    assert all(first[name] is again[name] for name in ("records", "tensor_of_chunk", "fresh"))
    model["grad"][0] = model["grad"][0].clone()
    ((_, moved),) = planned(model)
    assert moved["records"] is first["records"]
    assert moved["fresh"].tolist() == [g.data_ptr() for g in model["grad"]]


def test_a_graph_holds_the_addresses_that_are_new_and_refuses_a_new_model(monkeypatch):
    model = make_model(DEVICE, (64, 32), offsets=(0, 4))
    ((_, first),) = planned(model)
    monkeypatch.setattr(tables, "_capturing", lambda device: True)
    model["grad"][1] = model["grad"][1].clone()
    ((_, captured),) = planned(model)
    assert captured["records"] is first["records"]
    assert captured["fresh"].tolist() == [g.data_ptr() for g in model["grad"]]
    with pytest.raises(RuntimeError, match="run the same step once before the capture"):
        planned(make_model(DEVICE, (64, 32), offsets=(0, 4)))


def test_addresses_and_indices_beyond_32_bits():
    # The last chunk of a tensor of 2**33 + 3000 elements: its record points so far before the real memory.
    n, chunk = 3000, tables.BLOCK
    before = 2**33 // chunk
    model = make_model(DEVICE, (n,), offsets=(2**33,), streams=(3,))
    expected = model.to("cpu", torch.float64)
    counters = torch.tensor([2, 0, 0], device=DEVICE)
    sample(expected, [2, 0, 0])
    address = {name: model[name][0].data_ptr() - 4 * 2**33 for name in ("param", "mean", "std")}
    cells = [2**33 + n, 0, 0, 3, -before, *(address.get(name, 0) for name in tables.ARRAYS)]
    records = torch.tensor([cells], device=DEVICE)
    tensor_of_chunk = torch.zeros(math.ceil(n / chunk), dtype=torch.int32, device=DEVICE)
    sample_kernel[(len(tensor_of_chunk),)](
        records,
        tensor_of_chunk,
        counters,
        chunk,
        **tables.key_schedule(-77),
        PARAM_TYPE=tl.float32,
        ALIGNED=True,
        ANTITHETIC=False,
        STOCHASTIC=False,
        BLOCK=tables.BLOCK,
        TARGET=tables.TARGET,
        **tables.LAUNCH,
    )
    eps = normals(expected, 0, 2)
    allowed = 4e-6 * expected["std"][0] * eps.abs().clamp(min=1) + 1e-6
    assert ((model["param"][0].cpu().double() - expected["param"][0]).abs() <= allowed).all()


def test_a_tensor_of_more_than_2_to_the_33_elements_is_covered():
    numel = 2**33 + 20_000
    layout = tables._Layout(
        torch.device("cpu"),
        (64, numel, 64),
        (0, 0, 0),
        (0, 1, 2),
        ((0, 0, 0),) * len(tables.ARRAYS),
        ((torch.float32,) * 3,) * 3,
        frozenset(),
    )
    (launch,) = tables._launches.__wrapped__(layout, 512)
    cells = launch.records.get()
    assert launch.chunk == 512 * tables.MOST_ITERATIONS
    assert cells[:, multi_tensor.NUMEL.value].tolist() == [64, numel, 64]
    assert cells[:, multi_tensor.FIRST_CHUNK.value].tolist() == [0, 1, 1 + math.ceil(numel / launch.chunk)]
    assert len(launch.tensor_of_chunk.get()) == launch.chunks == 2 + math.ceil(numel / launch.chunk)


# --- races ---------------------------------------------------------------------------------------------


class Accesses:
    """Who loads and stores what in the interpreted kernels: for every address the program, its lane and its barriers.

    A single number is loaded by all lanes, which count as None, and stored by the first.
    """

    def __init__(self, interpreter):
        self.original, self.builder = interpreter._interpreter, interpreter.interpreter_builder
        self.barriers = 0
        self.launches = []

    def __getattr__(self, name):
        return getattr(self.original, name)

    def load(self, pointers, mask, *rest):
        self.note("loads", None, pointers, mask)
        return self.original.load(pointers, mask, *rest)

    def store(self, pointers, values, mask):
        self.note("stores", 0, pointers, mask)
        return self.original.store(pointers, values, mask)

    def note(self, kind, single, pointers, mask):
        table = self.launches[-1][kind]
        lanes = [single] if pointers.size == 1 else range(pointers.size)
        for lane, address, accessed in zip(lanes, pointers.flat, mask.flat, strict=True):
            if accessed:
                table[int(address)].add((self.builder.grid_idx[0], lane, self.barriers))

    def watch(self, monkeypatch, interpreter):
        def begin(*size, original=self.builder.set_grid_dim):
            self.launches.append({"loads": defaultdict(set), "stores": defaultdict(set)})
            original(*size)

        def barrier():
            self.barriers += 1

        monkeypatch.setattr(interpreter, "_interpreter", self)
        monkeypatch.setattr(self.builder, "set_grid_dim", begin)
        monkeypatch.setattr(self.builder, "create_barrier", barrier)

    def races(self):
        """How many addresses one lane stores and another one loads or stores with no barrier between them."""

        def clash(a, b):
            return a[0] != b[0] or (a[1] != b[1] and a[2] == b[2])

        return sum(
            any(clash(store, other) for store in stores for other in stores | launch["loads"][address])
            for launch in self.launches
            for address, stores in launch["stores"].items()
        )


RACES = {
    "sample": lambda m: sample(m, [5, 0, 0], backend=TRITON),
    "accumulate": lambda m: accumulate(m, Options(counters=(5, 1, 0)), TRITON),
    "accumulate, pair": lambda m: accumulate(m, Options(pair=True, antithetic=True, counters=(4, 0, 0)), TRITON),
    "step": lambda m: step(m, Options(), TRITON),
    "step, sums": lambda m: step(m, Options(statistics=True, counters=(5, 1, 0)), TRITON),
    "step, pair": lambda m: step(m, Options(pair=True, antithetic=True, counters=(5, 1, 0)), TRITON),
    "step, unbounded": lambda m: step(m, Options(max_std=math.inf), TRITON),
    "step without prior": lambda m: step(m, Options(prior=False), TRITON),
    "step, codes": lambda m: step(with_codes(m), Options(codes=True), TRITON),
    "step, found_inf": lambda m: step(m, Options(grad_scale=2.0, found_inf=0.0), TRITON),
    "gauss_newton": lambda m: gauss_newton(m, Options(), TRITON),
    "gauss_newton, found_inf": lambda m: gauss_newton(m, Options(grad_scale=2.0, found_inf=0.0), TRITON),
    "gaussian_kl": lambda m: ops.gaussian_kl(
        *(m[name] for name in ("mean", "std", "prior_mean", "prior_std")), backend="triton"
    ),
}


@pytest.mark.skipif(not tables.INTERPRETED, reason="the interpreter shows who reads and writes what")
@pytest.mark.parametrize("call", RACES.values(), ids=RACES)
def test_no_lane_touches_what_another_stores(call, monkeypatch):
    interpreter = sys.modules["triton.runtime.interpreter"]
    accesses = Accesses(interpreter)
    # The last block of both is partly filled; one tensor is aligned, the other is not.
    model = make_model(DEVICE, (24, 30), offsets=(0, 1))
    accesses.watch(monkeypatch, interpreter)
    call(model)
    assert sum(len(launch["stores"]) for launch in accesses.launches) >= 24 + 30
    assert accesses.races() == 0


# --- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA or ROCm device")
def test_a_step_replays_from_a_cuda_graph_as_it_runs():
    eager, captured = (make_model("cuda", (4096, 1000, 33)) for _ in range(2))
    rule = rule_of(eager, Options())

    def run(model, counters):
        draws = ops.Draws(model.offsets, model.streams, 1, counters, antithetic=True)
        state = state_of(model, "prior_mean", "prior_std")
        kernels.step(model["param"], model["grad"], state, draws, rule, ops.Amp())

    counters = [torch.zeros(3, dtype=torch.int64, device="cuda") for _ in range(2)]
    for _ in range(5):
        run(eager, counters[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(captured, counters[1])
    torch.cuda.current_stream().wait_stream(stream)
    # A gradient whose address is new in the capture.
    captured["grad"][0] = captured["grad"][0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured, counters[1])
    for _ in range(4):
        graph.replay()
    assert torch.equal(*counters)
    for name in ("param", "mean", "std", "grad"):
        assert all(torch.equal(a, b) for a, b in zip(eager[name], captured[name], strict=True)), name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA or ROCm device")
def test_a_step_never_waits_for_the_device():
    model = make_model("cuda", (4096, 33))
    step(model, Options(), TRITON)
    rule, amp = rule_of(model, Options()), amp_of(model, Options(grad_scale=2.0, found_inf=0.0))
    draws, state = draws_of(model, (0, 0, 0), antithetic=True), state_of(model, "prior_mean", "prior_std")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model["grad"][0] = model["grad"][0].clone()
            kernels.step(model["param"], model["grad"], state, draws, rule, amp)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- dispatch ----------------------------------------------------------------------------------------


def test_auto_prefers_triton_on_gpus():
    assert backends.AUTO["cuda"][0] == "triton"


def test_without_the_interpreter_triton_refuses_cpu_tensors_and_says_what_helps():
    code = "from distruction.ops import backends; print(backends.unavailable('triton', 'cpu'))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1, set before Python starts" in run.stdout


def test_the_environment_forces_triton(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    assert backends.resolve("auto", DEVICE) is kernels


# --- trajectories ------------------------------------------------------------------------------------


def problem():
    """A classifier of two tensors: the interpreter's time goes by their number."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 4, bias=False))
    model = torch.nn.Sequential(*layers).to(DEVICE)
    inputs = torch.randn(32, 6, generator=generator).to(DEVICE)
    targets = torch.randint(4, (32,), generator=generator).to(DEVICE)
    return model, inputs, targets


TRAJECTORY = 1e-5
"""Relative, after fifty updates."""


def check_trajectory(expected, ours):
    for name, mean in expected.means.items():
        std = expected.stds[name]
        assert (ours.means[name] - mean).norm() <= TRAJECTORY * mean.norm(), name
        assert ((ours.stds[name] - std).abs() / std).max() <= TRAJECTORY, name


@pytest.mark.parametrize(("mc_samples", "forgetting"), [(1, False), (2, True)], ids=["prepare", "forget"])
def test_fifty_steps_follow_the_reference(mc_samples, forgetting):
    posteriors = []
    for backend in ("reference", "triton"):
        model, inputs, targets = problem()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        options = {"std_init": 0.05, "data_per_step": 32.0, "mc_samples": mc_samples, "lr": 0.5}
        if forgetting:
            prior = distruction.Posterior(start, {n: torch.full_like(p, 0.05) for n, p in start.items()})
            options |= {"prior": prior, "kl_weight": 0.1, "std_init": prior}
        opt = distruction.BGD(model.named_parameters(), backend=backend, **options)
        opt.train()
        for _ in range(50 * mc_samples):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            (-loss if forgetting else loss).backward()
            opt.step()
        opt.eval()
        posteriors.append(opt.posterior())
    expected, ours = posteriors
    check_trajectory(expected, ours)
    mean_moved = std_moved = 0.0
    for name, mean in expected.means.items():
        std = expected.stds[name]
        mean_moved = max(mean_moved, ((mean - start[name]).norm() / mean.norm()).item())
        std_moved = max(std_moved, (std / 0.05).log().abs().max().item())
    # Far beyond the tolerance, or the start alone would pass.
    assert min(mean_moved, std_moved) > 1000 * TRAJECTORY


@pytest.mark.slow
def test_preparing_and_forgetting_a_digit_as_the_demo_does_follow_the_reference():
    from distruction import data, models

    train_data, _ = data.load("digits")
    forget_data, _ = data.forget_split(train_data, "8")
    found = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        # The demo's model with one block and a quarter of the width.
        model = models.VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=4
        ).to(DEVICE)
        options = {"steps": 50, "seed": 0, "backend": backend, "progress": False}
        # A step counts for the data that it reads. The demo's counts for all data, 22 times as much: that amplifies
        # float32's rounding of the gradients, and any two backends differ by a few 1e-5 in some std.
        train_loader = data.loader(train_data, batch_size=64)
        posterior = distruction.prepare(model, train_loader, evidence=50 * 64.0, **options)
        if backend == "triton":
            check_trajectory(found["prepared"], posterior)
            # From the same posterior, so that the fifty steps are those of forgetting alone.
            posterior = found["prepared"]
            posterior.mean_(model)
        loader = data.loader(forget_data, batch_size=64)
        forgotten = distruction.forget(model, posterior, loader, **options).posterior
        if backend == "triton":
            check_trajectory(found["forgotten"], forgotten)
        found |= {"prepared": posterior, "forgotten": forgotten}
    prepared, forgotten = found["prepared"], found["forgotten"]
    assert max((s / 0.05).log().abs().max() for s in prepared.stds.values()) > 1000 * TRAJECTORY
    moved = ((forgotten.means[n] - m).norm() / m.norm() for n, m in prepared.means.items() if m.any())
    assert max(moved) > 1000 * TRAJECTORY
