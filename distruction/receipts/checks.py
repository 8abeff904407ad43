"""Whether what is here is what a receipt speaks of: files, key, records; and the run again, to the bit."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..forget_report import ForgetReport
from ..forgetting import forget
from ..loop import Batches
from ..modules import covered
from ..posterior import Posterior
from . import records
from .receipt import TOLERANCE, file_facts, weights_sha256


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: in a few words.
        holds: whether it is as the receipt says; ``None``: it was not looked at.
        detail: what was found, or what to pass for it to be looked at.
    """

    what: str
    holds: bool | None
    detail: str = ""


def file(receipt: Mapping[str, Any], role: str, path: Path | None, option: str) -> Check:
    """Whether a file or folder has the SHA-256 of the receipt.

    Args:
        role: of ``files`` in the receipt.
        path: of the file; ``None``: it is not looked at.
        option: the option that names it, for the advice.
    """
    what = role.replace("_", " ")
    stated = receipt["files"][role]
    if stated is None:
        return Check(what, None if path is None else False, "the receipt names none")
    if path is None:
        return Check(what, None, f"pass {option}")
    found = file_facts(path)
    if found == stated:
        return Check(what, True, f"SHA-256 {stated['sha256'][:16]}...")
    theirs, mine = stated.get("files", {}), found.get("files", {})
    differing = [n for n in sorted({*theirs, *mine}) if theirs.get(n) != mine.get(n)]
    more = f"; differing: {', '.join(differing[:3])}" if theirs and mine else ""
    return Check(what, False, f"SHA-256 {found['sha256'][:16]}..., not {stated['sha256'][:16]}...{more}")


def signature(receipt: Mapping[str, Any], public: bytes | None) -> Check:
    """Whether the key that signed is the one that is trusted (that its signature holds was found in reading)."""
    signer = receipt["signer"]
    if signer is None:
        return Check("signature", None if public is None else False, "the receipt is not signed")
    named = signer["public_key"]
    if public is None:
        return Check("signature", None, f"valid by the key {named[:16]}...; whose it is: pass --public-key")
    holds = named == public.hex()
    return Check("signature", holds, f"by the key {named[:16]}..." + ("" if holds else f", not {public.hex()[:16]}..."))


def forget_set(receipt: Mapping[str, Any], digests: Iterable[bytes], secret: bytes) -> Check:
    """Whether these are the records of the request, all of them and no other."""
    tree = records.Tree(digests, secret)
    stated = receipt["forget_set"]
    if tree.root.hex() == stated["root"] and len(tree) == stated["size"]:
        return Check("forget set", True, f"{len(tree):,} records")
    return Check("forget set", False, f"these {len(tree):,} records are not the {stated['size']:,} of the receipt")


def record(receipt: Mapping[str, Any], digest: bytes, proof: records.Proof) -> Check:
    """Whether a record was in the forget set, by its inclusion proof."""
    stated = receipt["forget_set"]
    holds = proof.size == stated["size"] and proof.shows(bytes.fromhex(stated["root"]), digest)
    return Check("record", holds, "in the forget set" if holds else "the proof does not lead from it to the root")


def read_proof(path: Path) -> records.Proof:
    """The proof in a file.

    Raises:
        UsageError: it holds none.
    """
    try:
        return records.Proof.from_json(json.loads(path.read_bytes()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a proof: {error}") from error


def arguments(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """What a replay passes to `distruction.forget`."""
    method = receipt["method"]
    numbers = {n: float(method[n]) for n in ("data_per_step", "lr")}
    more = {n: method[n] for n in ("target", "depth", "classifier") if n in method}
    if "cosine_level" in method:
        more["cosine_level"] = float(method["cosine_level"])
    # It has a level of its own, which forget takes from nobody.
    level = None if method.get("target") == "unseen" else method["level"]
    return {
        **more,
        **{n: method[n] for n in ("objective", "steps", "mc_samples", "seed")},
        **numbers,
        "kl_weight": method["kl_weight"] if method["kl_weight"] == "auto" else float(method["kl_weight"]),
        "level": None if level is None else float(level),
        "request": receipt["request"]["kind"],
    }


def replay(
    receipt: Mapping[str, Any],
    model: nn.Module,
    posterior: Posterior,
    loader: Batches,
    *,
    machine: Mapping[str, Any],
    unlearned: nn.Module | None = None,
    previous: Posterior | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> Check:
    """Run the request again and compare: the same bits on the same machine, else within `TOLERANCE`.

    Args:
        receipt: of `distruction.receipts.read`.
        model: from before; it ends holding what the run gives.
        posterior, previous: as in `distruction.forget`.
        loader: of the same records in the same order and batches.
        machine: this one, as in `distruction.receipts.machine`.
        unlearned: the model of the receipt, to say how far away another result is.
        backend: see `distruction.ops`.
        progress: show a progress bar.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(receipt["machine"]["threads"])
    try:
        result = forget(
            model, posterior, loader, previous=previous, backend=backend, progress=progress, **arguments(receipt)
        )
    finally:
        torch.set_num_threads(threads)
    if weights_sha256(model) == receipt["weights"]["after"]:
        return Check("replay", True, f"the same bits after {len(result.history)} steps in {result.seconds:.1f} s")
    here = {**machine, "threads": receipt["machine"]["threads"]}
    differing = sorted(k for k in here if here[k] != receipt["machine"][k])
    if not differing:
        return Check("replay", False, "other bits on the same machine")
    if unlearned is None:
        return Check("replay", False, f"other bits ({', '.join(differing)} differ); pass --model to compare by KL")
    share = distance(result, unlearned) / max(result.kl, 1e-12)
    text = f"KL to the receipt's result is {100 * share:.2g} % of KL(q || p); differing: {', '.join(differing)}"
    return Check("replay", share <= TOLERANCE, text)


def distance(result: ForgetReport, model: nn.Module) -> float:
    """KL in nats between q and the same Gaussians around another model's weights: sum of (difference / std)**2 / 2."""
    q = result.posterior
    params = covered(model, q.shapes)
    total = torch.zeros((), dtype=torch.float64)
    for name, (mean, std) in q.items():
        difference = params[name].detach().double().cpu() - mean.double().cpu()
        total += (difference / std.double().cpu()).square().sum() / 2
    return float(total)
