"""Words for what a user passes, the same in every process: a checkpoint's settings are compared by them."""

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import gather


def described(value: Any) -> Any:
    """JSON-able words for an argument, the same in another process: what it is, and its parameters.

    Two objects that may do different things get different words, as far as their attributes tell: numbers, strings
    and tensors by value, modules by their parameters and buffers, functions by their place and code.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {_digest(value)}"
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [described(v) for v in (value if isinstance(value, list | tuple) else sorted(value, key=repr))]
    if isinstance(value, functools.partial):
        return {"partial": described(value.func), "args": described(value.args), "keywords": described(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": value.__func__.__qualname__, "of": described(value.__self__)}
    code = getattr(value, "__code__", None)
    if code is not None:
        words = f"{value.__module__}.{value.__qualname__} {_digest(*_instructions(code))}"
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        parameters = [described(v) for v in [*held, *(value.__defaults__ or ())]]
        return {"function": words, "parameters": parameters} if parameters else words
    if isinstance(value, type) or callable(getattr(value, "__get__", None)) or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    kind = type(value).__qualname__
    if isinstance(value, nn.Module):
        options = {
            k: v for k, v in vars(value).items() if not k.startswith("_") and isinstance(v, bool | int | float | str)
        }
        options.pop("training", None)
        return {kind: {**options, "state": _digest(*(t for _, t in sorted(value.state_dict().items())))}}
    return {kind: {k: described(v) for k, v in vars(value).items()}}


def _instructions(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)
        else:
            # The order of a set of strings differs between processes.
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode()


def _digest(*parts: Tensor | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = gather(part.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(part)
    return digest.hexdigest()[:16]
