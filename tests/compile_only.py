"""Every op through Triton's own just-in-time compiler for a GPU that need not be there: a driver that launches nothing.

``python tests/compile_only.py TARGET`` prints, as JSON, how many variants of each kernel were compiled and what failed.
What an op may be called with is read off its schema, so that a new op is covered when it is registered.
"""

import itertools
import json
import math
import random
import secrets
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from distruction import kernels, ops
from distruction.kernels import tables
from distruction.kernels.multi_tensor import finish_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SEEDS = (0, 1, 2, 2**32, secrets.randbits(63))
TYPES = ("float32", "bfloat16", "float16")
LISTS_THAT_MAY_BE_EMPTY = {
    "accumulate": {"m2": {"sums"}},
    "step": {
        "m1": {"pair", "sums"},
        "m2": {"sums"},
        "prior_mean": {"floats", "codes", "codes, bfloat16"},
        "prior_std": {"floats"},
        **{name: {"codes", "codes, bfloat16"} for name in ("prior_codes", "prior_low", "prior_step")},
    },
}
"""By op: the choices with which they are not empty."""
STATISTICS = {"accumulate": ("pair", "sums"), "step": ("none", "pair", "sums")}


class Driver:
    """What Triton asks of a driver, for a device on which launches do nothing."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")
        self.launcher_cls = lambda source, metadata: lambda *arguments: None
        properties = {"max_shared_mem": 1 << 16, "multiprocessor_count": 1, "warpSize": target.warp_size}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )


def options_of(op):
    """The choices that an op's schema leaves, by name."""
    options = {"aligned": (True, False)}
    for argument in op.default._schema.arguments:
        name, kind = argument.name, str(argument.type)
        if name in ("m1", "m2"):
            options["statistics"] = STATISTICS[op.__name__]
        elif name in LISTS_THAT_MAY_BE_EMPTY.get(op.__name__, ()):
            options["prior"] = ("floats", "codes", "codes, bfloat16", "none")
        elif name in ("param", "out", "grad"):
            options[name] = TYPES
        elif kind in ("bool", "Optional[Tensor]"):
            options[name] = (True, False)
        elif name.startswith("max_"):
            options["bounded"] = (True, False)
    return options


def tensor(dtype, aligned):
    return torch.ones(12, dtype=getattr(torch, dtype))[0 if aligned else 1 :][:8]


def type_of(name, choice):
    if name == "prior_codes":
        return "uint8"
    return "bfloat16" if name == "prior_mean" and "bfloat16" in choice.get("prior", "") else choice.get(name, "float32")


def call(op, choice, *, seed=3, tensors=1, number=0.5, counters=None):
    """Call an op as ``choice`` says."""
    arguments = {}
    for argument in op.default._schema.arguments:
        name, kind = argument.name, str(argument.type)
        if kind == "List[Tensor]":
            when = LISTS_THAT_MAY_BE_EMPTY.get(op.__name__, {}).get(name)
            given = when is None or bool(when & {choice.get("statistics"), choice.get("prior")})
            kept = [tensor(type_of(name, choice), choice["aligned"]) for _ in range(tensors)]
            arguments[name] = kept if given else []
        elif kind == "List[int]":
            arguments[name] = [0] * tensors
        elif kind == "Optional[Tensor]":
            arguments[name] = torch.tensor(1.0) if choice[name] else None
        elif name == "counters":
            arguments[name] = torch.zeros(3, dtype=torch.int64) if counters is None else counters
        elif name == "backend":
            arguments[name] = "triton"
        elif kind == "Tensor":
            arguments[name] = torch.tensor(number)
        elif kind == "bool":
            arguments[name] = choice[name]
        elif kind == "int":
            arguments[name] = seed
        else:
            arguments[name] = math.inf if name.startswith("max_") and not choice["bounded"] else number
    op(**arguments)


def every_pair(options):
    """Few choices that contain every value of an option, and every pair of values of two; greedy."""
    names = list(options)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    missing |= {((a, x), (a, x)) for a in names for x in options[a]}
    generator = random.Random(0)
    while missing:
        best = dict(min(missing, key=str))
        for name in generator.sample(names, len(names)):
            if name not in best:
                gain = {x: sum(pair in missing for pair in pairs_of({**best, name: x}, names)) for x in options[name]}
                best[name] = max(options[name], key=gain.__getitem__)
        missing -= set(pairs_of(best, names))
        yield best


def pairs_of(choice, names):
    return itertools.combinations_with_replacement([(n, choice[n]) for n in names if n in choice], 2)


def variants(kernel):
    return len(kernel.device_caches[0][0])


def main(target):
    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    tables.TARGET, tables.BLOCK = TARGETS[target].backend, tables.BLOCKS[TARGETS[target].backend]
    kernels.unavailable = lambda device_type: None
    result = {"seed": SEEDS[-1], "failures": [], "choices": {}, "compiled": {}, "compiled_for_other_values": {}}
    for name in ops._SCHEMAS:
        op = getattr(torch.ops.distruction, name)
        options = options_of(op)
        choices = []
        for choice in every_pair(options):
            if choice.get("statistics") == "pair":
                choice["antithetic"] = True
            if choice not in choices:
                choices.append(choice)
        kernel = getattr(sys.modules[getattr(kernels, name).__module__], f"{name}_kernel")

        def attempt(choice, op=op, name=name, **values):
            try:
                call(op, choice, **values)
            except Exception as error:
                result["failures"].append(f"{name} {choice} {values}: {error} {error.__cause__ or ''}"[-2000:])

        for choice in choices:
            attempt(choice)
        before = variants(kernel), variants(finish_kernel)
        for seed in SEEDS if "seed" in str(op.default._schema) else ():
            attempt(choices[0], seed=seed)
        attempt(choices[0], tensors=16, number=1.0, counters=torch.zeros(4, dtype=torch.int64)[1:])
        after = variants(kernel), variants(finish_kernel)
        result["choices"][name], result["compiled"][name] = len(choices), before[0]
        result["compiled_for_other_values"][name] = sum(after) - sum(before)
    result["compiled"]["finish"] = variants(finish_kernel)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
