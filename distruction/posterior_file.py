"""The posterior's file: safetensors with the means and stds by parameter name, or the stds alone as 8-bit codes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .compression import LogCodes, Restored, Stored, restore, store, stored
from .errors import PosteriorError, UsageError
from .files import load_facts, load_tensors, save_tensors
from .modules import covered, difference, fingerprint
from .ops.reference.codes import BLOCK
from .sharding import gather, local

FORMAT = "distruction-posterior-1"


def write(
    path: str | os.PathLike[str],
    means: Mapping[str, Stored],
    stds: Mapping[str, Stored],
    metadata: Mapping[str, Any],
    *,
    compress: bool,
) -> None:
    """Write the file atomically; see `distruction.posterior.Posterior.save`."""
    facts: dict[str, Any] = {"names": list(means), "metadata": metadata}
    tensors: dict[str, Tensor] = {}
    if compress:
        if any(t.dtype != torch.float32 for t in means.values() if isinstance(t, Tensor)):
            raise UsageError("the means are in bfloat16, no checkpoint's; save before compress(mean='bfloat16')")
        facts |= {"means": fingerprint(Restored(means)), "block": BLOCK}
        for name, std in stds.items():
            codes = store(std, "log8")
            assert isinstance(codes, LogCodes)
            tensors |= {f"codes.{name}": codes.codes, f"low.{name}": codes.low, f"step.{name}": codes.step}
    else:
        for kind, kept in (("mean", means), ("std", stds)):
            tensors |= {f"{kind}.{n}": restore(t) for n, t in kept.items()}
    save_tensors(path, tensors, format=FORMAT, facts=facts)


def read(
    path: str | os.PathLike[str], *, map_location: str | torch.device, model: nn.Module | None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], dict[str, Any]]:
    """The means, stds and metadata of the file; see `distruction.posterior.Posterior.load`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no posterior file at {path}; write one with `distruction prepare` or Posterior.save")
    try:
        tensors, facts = load_tensors(path, format=FORMAT, device=str(map_location))
        means: Mapping[str, Tensor] | None
        stds: Mapping[str, Tensor]
        names, metadata = facts["names"], dict(facts["metadata"])
        if not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ValueError("its header names no parameters")
        if "means" in facts:
            means, stds = None, Restored({n: _codes(tensors, n, facts["block"]) for n in names})
        else:
            means = {n: tensors.pop(f"mean.{n}") for n in names}
            stds = {n: tensors.pop(f"std.{n}") for n in names}
    except (ValueError, KeyError, TypeError) as error:
        raise PosteriorError(f"{path} cannot be read as a posterior: {error}; prepare it again") from error
    if tensors:
        raise PosteriorError(f"{path} holds tensors that its header does not name: {sorted(tensors)[:3]}")
    if means is None:
        means = _means_of(model, path, names, stds, facts["means"], map_location)
    return means, stds, metadata


def metadata_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of the file, without its tensors."""
    try:
        return dict(load_facts(path, format=FORMAT)["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise PosteriorError(f"{path} cannot be read as a posterior: {error}") from error


def _means_of(
    model: nn.Module | None,
    path: str | os.PathLike[str],
    names: Sequence[str],
    stds: Mapping[str, Tensor],
    sha256: str,
    map_location: str | torch.device,
) -> dict[str, Tensor]:
    """The means of a compressed file: copies of the weights that it was prepared for."""
    if model is None:
        raise PosteriorError(
            f"{path} is compressed: its means are the weights that it was prepared for; pass the model that holds "
            "them as model="
        )
    params = covered(model, {n: s.shape for n, s in stored(stds).items()})
    if fingerprint({n: params[n] for n in names}) != sha256:
        raise PosteriorError(
            f"{path} was prepared for other weights: their SHA-256 differs from that of the model's; load the "
            "model's checkpoint that preparation was given, after an earlier request as well (beside --previous)"
        )
    whole = ((n, gather(params[n].detach())) for n in names)
    return {n: p.to(map_location, torch.float32, copy=True).contiguous() for n, p in whole}


def _codes(tensors: dict[str, Tensor], name: str, block: int) -> LogCodes:
    """Take the codes of a parameter out of a file's tensors.

    Raises:
        ValueError: they do not fit together.
        KeyError: one is missing.
    """
    found = LogCodes(*(tensors.pop(f"{kind}.{name}") for kind in ("codes", "low", "step")))
    blocks = -(-found.numel() // BLOCK)
    if (
        block != BLOCK
        or found.codes.dtype != torch.uint8
        or any(t.dtype != torch.float32 or t.shape != (blocks,) for t in (found.low, found.step))
    ):
        raise ValueError(f"the codes of {name} do not fit together")
    return found


def fault_of(means: Mapping[str, Tensor], stds: Mapping[str, Tensor]) -> str | None:
    """What is wrong with these tensors or, of sharded ones, with the parts on this rank."""
    if not means:
        return "a posterior needs at least one parameter; does the model have any that requires_grad?"
    if list(means) != list(stds):
        return f"means and stds name different parameters: {difference(means, stds)}; give both for each name"
    for name, mean in means.items():
        std = stds[name]
        if mean.shape != std.shape:
            return f"{name}: mean is {tuple(mean.shape)} but std is {tuple(std.shape)}"
        for what, t in (("mean", mean), ("std", std)):
            if t.dtype != torch.float32:
                return f"{name}: {what} is {t.dtype}; convert it to torch.float32"
            if not local(t).isfinite().all():
                return f"{name}: {what} holds NaN or infinity; prepare the posterior again"
        if not (local(std) > 0).all():
            return f"{name}: std must be > 0, its smallest value is {local(std).min().item():g}"
    return None
