"""One call of the ops for some parameters of a group: a sample, its statistics, an update."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import ops
from ..distributed import all_reduce_
from ..posterior import Posterior
from ..sharding import Pieces, are_ordinary, is_sharded, layout, local
from .counters import advance

STREAMED_ELEMENTS = 2**24
"""Elements of a prior that a step does not read as it is stored which are restored at a time, in whole tensors: 64 MiB
each for mean and std."""

RULE = ("max_mean_step", "max_log_std_step", "max_std", "learn_mean", "learn_std")
"""A group's options that the update rule takes under their own names."""


class Members:
    """Some parameters of a group as the ops take them: this rank's pieces, contiguous, on one device.

    Args:
        group: theirs.
        params: the parameters.
        states: of each, with ``mean`` and ``std``.
        streams: generator stream of each.
        in_pairs: an update takes one antithetic pair, of which m1 holds the first gradient and m2 is not needed.
    """

    def __init__(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        streams: list[int],
        in_pairs: bool = False,
    ) -> None:
        self.group, self.params, self._states, self._in_pairs = group, params, states, in_pairs
        self.pieces = Pieces(params, streams)
        self.mean = self.pieces.of([s["mean"] for s in states])
        self.std = self.pieces.of([s["std"] for s in states])
        self._ordinary = are_ordinary(params)
        self._held = params if self._ordinary else [local(p) for p in params]
        self._buffers = self._held if _are_contiguous(self._held) else [_contiguous(t) for t in self._held]
        self.outs = self.pieces.of(self._buffers)

    def sample(self, counters: Tensor) -> None:
        """Write the sample of the current draw into the parameters."""
        if not self.group["at_means"]:
            ops.sample(self.outs, self._state(), self._draws(counters), backend=self.group["backend"])
        self._copy_back()

    def expected(self, counters: Tensor) -> list[Tensor]:
        """What `sample` would write into each parameter, and has written unless somebody else did since."""
        if self.group["at_means"]:
            return [local(s["mean"]).to(t.dtype) for s, t in zip(self._states, self._held, strict=True)]
        made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in self._held]
        ops.sample(self.pieces.of(made), self._state(), self._draws(counters), backend=self.group["backend"])
        return made

    def accumulate(self, counters: Tensor, amp: ops.Amp) -> None:
        """Take the gradients into the statistics and write the next sample."""
        state, draws = self._state(*self._statistics()), self._draws(counters)
        if not state.m2:
            self._copy_in()  # the second sample of a pair may be made of the first
        ops.accumulate(self.outs, self._gradients(), state, draws, amp, backend=self.group["backend"])
        if not self.outs:
            advance(counters, False, amp.found_inf)
        self._copy_back()

    def step(
        self,
        counters: Tensor,
        scalars: tuple[Tensor, Tensor],
        prior: Posterior | None,
        names: Sequence[str],
        amp: ops.Amp,
        sample_group: Any,
    ) -> Tensor:
        """Update with the last sample's gradients and write the next sample; returns the KL of what is here.

        Args:
            scalars: lr and the KL weight.
            names: of the parameters, for the prior.
            sample_group: ranks whose statistics are summed; they hold the last sample's already.
        """
        group = self.group
        statistics = self._statistics() if group["mc_samples"] > 1 or sample_group is not None else ([], [])
        if sample_group is None:
            grads = self._gradients()
        else:
            # All samples are in the statistics; the step takes one more gradient, so it gets a zero.
            all_reduce_([*statistics[0], *statistics[1]], sample_group)
            ranks = dist.get_world_size(sample_group)
            counters[0] += (ranks - 1) * group["mc_samples"] - 1
            counters[1] = counters[1] * ranks - 1
            grads, amp = [torch.zeros_like(m) for m in self.mean], ops.Amp()
        sign = -1 if group["maximize"] else 1
        named = {name: group[name] for name in RULE}
        kl = ops.step(
            self.outs,
            grads,
            self._state(*statistics, **self._prior(prior, names, counters.device)),
            self._draws(counters),
            ops.Rule(*scalars, loss_scale=sign * group["data_per_step"], **named),
            amp,
            backend=group["backend"],
        )
        if not self.outs:
            advance(counters, True, amp.found_inf)
        self._copy_back()
        return kl

    def gauss_newton(self, counters: Tensor, amp: ops.Amp) -> None:
        """Add the gradients' squares to the precisions and write the next sample."""
        group, state, draws = self.group, self._state(), self._draws(counters)
        evidence = group["data_per_step"]
        ops.gauss_newton(self.outs, self._gradients(), state, draws, evidence, amp, backend=group["backend"])
        if not self.outs:
            advance(counters, True, amp.found_inf)
        self._copy_back()

    def separate(self, counters: Tensor, seed: int) -> None:
        """Give ``m2`` to those with the first gradient of a pair, drawn by ``seed``: the second sample is another's."""
        first = counters.clone()
        first[0] -= 1
        m1 = self.pieces.of([s["m1"] for s in self._states])
        for state in self._states:
            state["m2"] = torch.zeros_like(state["m1"])
        m2 = self.pieces.of([s["m2"] for s in self._states])
        draws = ops.Draws(self.pieces.offsets, self.pieces.streams, seed, first, self.group["antithetic"])
        # A sample of mean 0 and std m1 is m1 * eps.
        ops.sample(m2, ops.State([torch.zeros_like(m) for m in m1], m1), draws, backend=self.group["backend"])

    def _state(self, *statistics: list[Tensor], **prior: list[Tensor]) -> ops.State:
        return ops.State(self.mean, self.std, *statistics, **prior)

    def _prior(self, prior: Posterior | None, names: Sequence[str], device: torch.device) -> dict[str, list[Tensor]]:
        """The prior's lists, with its codes where it is kept so."""
        if prior is None or not names:
            return {}
        of, repeated = self.pieces.of, self.pieces.repeated
        if not prior.is_in_codes():
            means, stds = zip(*(prior.fetch(name, device) for name in names), strict=True)
            return {"prior_mean": of(means), "prior_std": of(stds)}
        means, codes = zip(*(prior.fetch_stored(name, device) for name in names), strict=True)
        blocks = {f"prior_{name}": repeated([getattr(c, name) for c in codes]) for name in ("low", "step")}
        return {"prior_mean": of(means), "prior_codes": of([c.codes for c in codes]), **blocks}

    def _draws(self, counters: Tensor) -> ops.Draws:
        group, pieces = self.group, self.pieces
        return ops.Draws(
            pieces.offsets, pieces.streams, group["seed"], counters, group["antithetic"], group["stochastic_rounding"]
        )

    def _statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        # A state may come with m2: that of an optimizer that kept it, or of a pair whose samples are of two seeds.
        in_pairs = self._in_pairs and not any("m2" in state for state in self._states)
        for state in self._states:
            add_statistics(state, in_pairs)
        m1 = self.pieces.of([s["m1"] for s in self._states])
        return m1, [] if in_pairs else self.pieces.of([s["m2"] for s in self._states])

    def _gradients(self) -> list[Tensor]:
        if self._ordinary:
            grads = [p.grad.detach() for p in self.params if p.grad is not None]
            if len(grads) == len(self.params):
                return grads if _are_contiguous(grads) else [g.contiguous() for g in grads]
        return self.pieces.of([_gradient(p) for p in self.params])

    def _copy_in(self) -> None:
        for held, buffer in zip(self._held, self._buffers, strict=True):
            if buffer is not held:
                buffer.copy_(held)

    def _copy_back(self) -> None:
        if self.group["at_means"]:
            if self._held:
                torch._foreach_copy_(list(self._held), [local(s["mean"]) for s in self._states])
            return
        if self._buffers is self._held:
            return
        for held, buffer in zip(self._held, self._buffers, strict=True):
            if buffer is not held:
                held.copy_(buffer)


def by_layout(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters in lists that are spread over ranks in one way, so that a sum over each list has one meaning."""
    if are_ordinary(params):
        return [list(params)] if params else []
    lists: dict[Any, list[Tensor]] = {}
    for p in params:
        lists.setdefault(layout(p), []).append(p)
    return list(lists.values())


def streamed(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in lists so short that the prior of each may be restored at a time."""
    lists: list[list[Tensor]] = [[]]
    room = STREAMED_ELEMENTS
    for p in params:
        if lists[-1] and p.numel() > room:
            lists.append([])
            room = STREAMED_ELEMENTS
        lists[-1].append(p)
        room -= p.numel()
    return lists


def _gradient(p: Tensor) -> Tensor:
    """What this rank holds of the gradient, contiguous and without history; zero where there is none."""
    if p.grad is None:
        return torch.zeros_like(local(p), memory_format=torch.contiguous_format)
    grad: Any = p.grad.detach()
    if is_sharded(p) and layout(grad) != layout(p):
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]  # a DTensor
    return local(grad).contiguous()


def add_statistics(state: dict[str, Tensor], in_pairs: bool) -> None:
    """Give a parameter's state the statistics of an update's samples: of a pair, the first gradient alone."""
    for name in ("m1",) if in_pairs else ("m1", "m2"):
        if name not in state:
            state[name] = torch.zeros_like(state["mean"])


def _are_contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _contiguous(t: Tensor) -> Tensor:
    """Where an op may write ``t``: itself, or a contiguous buffer."""
    return t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)
