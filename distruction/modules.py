"""What the library asks of a model: its parameters by name, their values' fingerprint, its mode, its logits."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import PosteriorError, UsageError
from .seeds import private_generators
from .sharding import gather

_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
}
"""Modules that stand for the one inside of them, and what they call it: by class name, because importing
``torch._dynamo`` would take longer than all the rest."""

_FLATTENED = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"


def _classes(module: nn.Module) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}


def _inner(module: nn.Module) -> str | None:
    """What a wrapper calls the module inside; ``None`` of any other module."""
    return next((_WRAPPERS[c] for c in _classes(module) if c in _WRAPPERS), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``torch.compile`` and their like; wrapped submodules stay so."""
    while (name := _inner(model)) is not None:
        model = getattr(model, name)
    return model


def names_within(model: nn.Module) -> dict[str, str]:
    """The name of each parameter in the bare model, and the one that ``model`` itself gives it.

    Wrappers (`unwrapped`) add a part to the names wherever they stand, as in
    ``model.trunk = torch.compile(model.trunk)``; a posterior goes by the bare model's names, so that it fits every form
    of one model. ``torch.func.functional_call(model, ...)`` takes the second.

    Raises:
        UsageError: the model has flattened parameters.
    """
    prefixes: list[tuple[str, str]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if _FLATTENED in _classes(module):
            raise UsageError(
                f"{path or 'the model'} is a FullyShardedDataParallel, whose flat parameters have neither the names "
                "nor the shapes of the model's: shard it with torch.distributed.fsdp.fully_shard instead"
            )
        if (inner := _inner(module)) is not None:
            stem = f"{path}." if path else ""
            prefixes.append((f"{stem}{inner}.", stem))
    names = {}
    for name, _ in model.named_parameters():
        bare = name
        # The innermost first: its prefix holds those of the wrappers around it.
        for prefix, stem in reversed(prefixes):
            if bare.startswith(prefix):
                bare = stem + bare[len(prefix) :]
        names[bare] = name
    return names


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of ``model`` by the bare model's names (`names_within`), frozen ones too, tied ones once."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    found = dict(model.named_parameters())
    return {bare: found[name] for bare, name in names_within(model).items()}


def learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that a posterior covers, by name: each with ``requires_grad``, tied ones once."""
    return {name: p for name, p in parameters_of(model).items() if p.requires_grad}


_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsuitable(p: Tensor) -> str | None:
    """Why a posterior cannot cover the parameter, with the remedy; ``None`` where it can."""
    if isinstance(p, nn.UninitializedParameter):
        return "has no shape yet; run one batch through the model first"
    if p.is_meta:
        return "is on the meta device and has no values; load the model's weights first"
    if p.dtype not in _TYPES:
        return f"is {p.dtype}, and a posterior is kept in float32; convert the model with model.float()"
    if p.is_inference():
        return "was made in torch.inference_mode(), so that nothing can be written into it; make the model outside"
    if p.layout != torch.strided:
        return f"has the layout {p.layout}; make it dense with .to_dense()"
    if any(step == 0 and size > 1 for step, size in zip(p.stride(), p.shape, strict=True)):
        return "is expanded: elements share memory and cannot differ; make it nn.Parameter(p.detach().clone())"
    return None


def require_suitable(params: Mapping[str, Tensor]) -> None:
    """Raise unless a posterior can cover these parameters.

    Raises:
        UsageError: names the first that it cannot, with the remedy.
    """
    for name, p in params.items():
        if (fault := unsuitable(p)) is not None:
            raise UsageError(f"parameter {name} {fault}")


def require_trainable(model: nn.Module) -> None:
    """Raise where a run of forward and backward passes cannot learn anything, or would change the weights by itself.

    Raises:
        UsageError: says why, with the remedy.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError("torch.inference_mode() is on, in which nothing has a gradient: call this outside of it")
    for name, module in unwrapped(model).named_modules():
        limit = getattr(module, "max_norm", None)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and limit is not None and module.weight.requires_grad:
            raise UsageError(
                f"the embedding {name} has max_norm={limit}, by which each forward pass overwrites its weight, a "
                "sample's included: set its max_norm to None, or freeze it"
            )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values in the order of the mapping."""
    digest = hashlib.sha256()
    for name, t in tensors.items():
        digest.update(f"{name}:{tuple(t.shape)};".encode())
        digest.update(gather(t.detach()).float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def covered(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that a posterior of these shapes covers, in its order; frozen ones are among them.

    Raises:
        UsageError: a parameter is of a kind that no posterior can cover.
        PosteriorError: the model lacks one of them or has it in another shape, or learns one that is not among them.
    """
    params = parameters_of(model)
    trained = {n: p for n, p in params.items() if p.requires_grad}
    require_suitable(trained)
    there = {n: params[n] for n in shapes if n in params}
    require_suitable(there)
    if len(there) < len(shapes):
        raise PosteriorError(f"the posterior belongs to another model: {difference({**trained, **there}, shapes)}")
    check_same({n: p.shape for n, p in there.items()}, shapes, "the posterior")
    if extra := [n for n in trained if n not in shapes]:
        raise PosteriorError(
            f"the posterior does not cover {_some(extra)}, which the model learns: they were frozen when it was "
            "prepared; freeze them again with requires_grad_(False), or prepare a posterior of all"
        )
    return there


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The first few names that only one of the two has."""
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    return f"only in the first {only_a[:3]}, only in the second {only_b[:3]}"


def check_same(shapes: Mapping[str, torch.Size], other: Mapping[str, torch.Size], what: str) -> None:
    """Raise unless each name has the same shape in ``other``, which may have more.

    Raises:
        PosteriorError: with the first few names or the shapes that differ.
    """
    if not set(shapes) <= set(other):
        raise PosteriorError(f"{what} belongs to another model: {difference(shapes, other)}")
    for name, shape in shapes.items():
        if shape != other[name]:
            raise PosteriorError(
                f"{what} belongs to another model: {name} is {tuple(shape)} here, {tuple(other[name])} there"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, frozen BatchNorm statistics) and private global generators; both restored after.

    With gradients on, recurrent layers that cuDNN serves stay in train mode with a dropout of 0: it refuses their
    backward in eval mode. Layers of transformers that are to recompute their activations do, as they would in train
    mode alone.

    Raises:
        UsageError: such a layer has a ``forward`` of its own, so that nobody knows what train mode does to it; the
            model has no eval mode; or ``torch.nn.utils.parametrize.cached()`` keeps weights of the first sample.
    """
    modes = {module: module.training for module in model.modules()}
    recurrent = [m for m in modes if isinstance(m, nn.RNNBase)] if torch.is_grad_enabled() else []
    recurrent = [m for m in recurrent if _served_by_cudnn(m)]
    for m in recurrent:
        if type(m).forward not in (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward):
            raise UsageError(
                f"{type(m).__name__} has a forward of its own, and cuDNN cannot run a recurrent layer's backward in "
                "eval mode: call it inside torch.backends.cudnn.flags(enabled=False)"
            )
    dropouts = {m: m.dropout for m in recurrent}
    recomputing = [m for m in modes if _is_to_recompute(m)] if torch.is_grad_enabled() else []
    forwards = {m: vars(m).get("forward") for m in recomputing}
    try:
        try:
            model.eval()
        except NotImplementedError as error:  # of what torch.export gives
            raise UsageError(f"the model has no eval mode ({error}): pass the module that it was made from") from error
        # In eval mode, in which asking for a weight changes no buffer of spectral_norm.
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module) and _is_cached(module):
                raise UsageError(
                    f"torch.nn.utils.parametrize.cached() is on, so that {name or 'the model'} keeps the weights of "
                    "the first sample for all of them: call this outside of it"
                )
        for m in recurrent:
            m.training, m.dropout = True, 0.0
        for layer in recomputing:
            layer.forward = _Recomputed(layer)
        with private_generators():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for m, dropout in dropouts.items():
            m.dropout = dropout
        for layer, forward in forwards.items():
            if forward is not None:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)


def _is_to_recompute(module: nn.Module) -> bool:
    """Whether it is a layer of transformers with activation checkpointing switched on, which nobody has wrapped yet."""
    layer = "transformers.modeling_layers.GradientCheckpointingLayer" in _classes(module)
    return layer and bool(module.gradient_checkpointing) and not isinstance(module.forward, _Recomputed)


class _Recomputed:
    """The forward of such a layer: with gradients on it keeps its inputs alone, and runs again in the backward pass.

    The layer stays in eval mode, for some drop out by their own mode. Hooks are outside, so that they run once.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._forward = layer.forward
        self._checkpoint: Any = layer._gradient_checkpointing_func

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return self._checkpoint(partial(self._forward, **kwargs), *args)


def _is_cached(module: nn.Module) -> bool:
    """Whether a parametrized module gives the tensor that it has made before."""
    name, chain = next(iter(module.parametrizations.items()))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        made = getattr(module, name)
        return made is getattr(module, name) and made is not getattr(chain, "original", None)


def _served_by_cudnn(module: nn.Module) -> bool:
    """Whether cuDNN (or MIOpen) runs a recurrent layer."""
    return torch.backends.cudnn.enabled and any(p.is_cuda for p in module.parameters())


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier gives: itself, or its ``logits``, as Hugging Face's models name them.

    Raises:
        UsageError: neither is a tensor.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor) and (not logits.is_floating_point() or logits.layout != torch.strided):
        raise UsageError(
            f"the model gives a tensor of {logits.dtype} and {logits.layout}; logits are dense and floating point"
        )
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"the model gives a {type(output).__name__}, neither logits nor an output with .logits; put it into a "
            "module whose forward returns its logits"
        )
    return logits
