"""The C++ kernels: what is theirs alone, for every instruction set; the matrix of backends is in test_ops_matrix."""

import pytest
import torch
from backends import Backend
from workloads import Options, make_model, sample, step

from distruction.ops import backends
from distruction.ops.reference.philox import philox

if backends.unavailable("cpp", "cpu") is not None:
    pytest.skip(backends.unavailable("cpp", "cpu"), allow_module_level=True)

from distruction.ops import cpp

USABLE = [name for name, (_, usable) in cpp.instruction_sets().items() if usable]


@pytest.fixture(params=cpp.instruction_sets())
def instruction_set(request, monkeypatch):
    if request.param not in USABLE:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(cpp.ENVIRONMENT, request.param)
    return request.param


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


def test_result_does_not_depend_on_threads_or_their_pool(instruction_set, monkeypatch):
    results = []
    before = torch.get_num_threads()
    for threads, own_pool in ((1, False), (2, False), (2, True), (7, True)):
        torch.set_num_threads(threads)
        with monkeypatch.context() as patch:
            if own_pool:
                patch.setattr(cpp, "_parallel_for", lambda: None)
            model = make_model("cpu", (1, 1000, 20_001))
            _, kl = step(model, Options(), Backend("cpp", "cpu"))
            results.append([torch.tensor(kl), *(t for tensors in model.tensors.values() for t in tensors)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_samples_of_a_large_tensor_that_bypass_the_caches_are_the_same(instruction_set):
    size = 2**17 + 101  # csrc/cpu/vectorised.h: kStreamed
    model = make_model("cpu", (size,))
    results = []
    for misaligned in (False, True):  # only an aligned tensor can bypass them
        sampled, stepped = model.to(misaligned=misaligned), model.to(misaligned=misaligned)
        assert (sampled["param"][0].data_ptr() % 64 == 0) is not misaligned
        sample(sampled, (3, 0, 0), backend=Backend("cpp", "cpu"))
        step(stepped, Options(), Backend("cpp", "cpu"))
        results.append((sampled["param"][0], stepped["param"][0]))
    for streamed, stored in zip(*results, strict=True):
        assert torch.equal(streamed, stored)


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices(monkeypatch):
    monkeypatch.setenv(cpp.ENVIRONMENT, "mmx")
    with pytest.raises(ValueError, match=r"mmx.*scalar"):
        step(make_model("cpu", (4,)), Options(), Backend("cpp", "cpu"))


def test_auto_takes_the_kernels_for_cpu_tensors(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    assert backends.resolve("auto", "cpu") is cpp
