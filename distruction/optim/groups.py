"""The inside of `BGD`: what its parameter groups hold, and how a call takes their gradients."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import ops
from ..errors import NonFiniteError, UsageError
from ..posterior import Posterior
from ..sharding import Pieces, groups_of, largest, local, shard_like
from . import options
from .counters import Counters, fork, join
from .options import labels_of
from .release import Released, check_first
from .state import Held, take_over
from .update import Members, add_statistics, by_layout, streamed


class Groups(torch.optim.Optimizer):
    """An optimizer whose parameters are Gaussians: draws, statistics and updates of its groups.

    The lists go by group: ``_initial`` std or posterior, ``_counters`` of samples, what the parameters are ``_held`` to
    hold, what backward has ``_released``, and the groups as they were checked last, ``_watched``. ``_now`` is what a
    step changes besides tensors; a dict because torch.compile (2.8) cannot set an optimizer's attribute:
    ``gradients_at_sample``; ``kl``, by group, the parts at its last update and the positions that they are of;
    ``looks``, uses of samples for prediction since the last step.
    """

    _initial: list[float | dict[str, float] | Posterior]
    _counters: list[Counters]
    _held: list[Held]
    _released: list[Released]
    _watched: list[options.Watched]
    _now: dict[str, Any]
    _prior: Posterior | None
    _sample_group: Any
    _release_gradients: bool
    _training: bool
    _scalars: dict[tuple[int, str], tuple[float, Tensor]]
    _position: dict[Tensor, int]

    def _consume(self) -> None:
        """Take the gradients of the current sample: into the statistics or, with the last sample, into an update."""
        self._check_groups()
        for group in self.param_groups:
            options.check_gradients(group)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if self._release_gradients and (grad_scale is not None or found_inf is not None):
            raise UsageError(
                "a GradScaler needs the gradients of the whole model before the update, which release_gradients has "
                "made by then; use bfloat16, or release_gradients=False"
            )
        self._now["gradients_at_sample"] = False
        self._now["looks"] = 0
        on_other_ranks: set[int] = set()
        if self._sample_group is not None:
            overflow, on_other_ranks = self._agree(found_inf)
            if overflow:
                return
            found_inf = None
        elif found_inf is not None and found_inf.device.type == "cpu" and not torch.compiler.is_compiling():
            if found_inf.item() != 0:
                return
            found_inf = None
        if not (
            on_other_ranks
            or any(p.grad is not None for group in self.param_groups for p in group["params"])
            or any(released.pending for released in self._released)
        ):
            return
        self._take_over()
        for index in range(len(self.param_groups)):
            self._consume_group(index, grad_scale, found_inf, on_other_ranks)
        on_cpu = all(c.tensor is None or c.tensor.device.type == "cpu" for c in self._counters)
        if on_cpu and not torch.compiler.is_compiling():
            self.raise_if_nonfinite()

    def _consume_group(
        self, index: int, grad_scale: Tensor | None, found_inf: Tensor | None, on_other_ranks: set[int]
    ) -> None:
        """Take a group's gradients."""
        group, counters, held = self.param_groups[index], self._counters[index], self._held[index]
        params: list[Tensor] = group["params"]
        tensor = counters.on(params[0].device)
        found_inf = None if found_inf is None else found_inf.to(tensor.device)
        learnable = learnable_positions(params)
        drawn = learnable if held.drawn is None else held.drawn
        taking = drawn if drawn == learnable else [i for i in drawn if params[i].requires_grad]
        released = self._released[index].take()
        done = {self._position[p] for p, _, _ in released}

        several = self._has_statistics(group)
        splits = None
        completes = counters.completes
        if group["mc_samples"] > 1 and self._sample_group is None and (found_inf is not None or not counters.known):
            splits = counters.split(found_inf, tensor.device)
            counters.known = False
        else:
            counters.count()
        updates = completes or splits is not None
        pulls = updates and self._prior is not None
        active = [
            i
            for i in taking
            if i not in done
            and (
                pulls
                or params[i].grad is not None
                or id(params[i]) in on_other_ranks
                or (several and "m1" in self.state[params[i]])
            )
        ]
        lists = by_layout([params[i] for i in active])
        if pulls and not self._prior.at_hand(tensor.device):  # type: ignore[union-attr]  # with a pull there is a prior
            lists = [part for whole in lists for part in streamed(whole)]
        if not (lists or released):
            lists = [[]]  # the call counts for a group without gradients too
        ends = [end for _, end, _ in released]
        kls = [(kl, p) for p, _, kl in released if kl is not None]
        for some in lists:
            # One draw number serves the group: each list starts from it.
            end = tensor if len(lists) == 1 and not released else fork(tensor)
            kl = self._take(index, some, end, completes, grad_scale, found_inf, splits)
            ends.append(end)
            if pulls and some and kl is not None:
                kls.append((kl, some[0]))
        if ends[0] is not tensor:
            join(tensor, ends)
        if pulls:
            self._now["kl"][index] = kls, taking
        if completes and splits is None and counters.in_pairs and not torch.compiler.is_compiling():
            self._drop_sums(params)

        if drawn != learnable:
            # Who was unfrozen waits for an update's first sample.
            drawn = learnable if counters.phase() == 0 else taking
        done.update(active)
        if len(done) < len(drawn):
            # Parameters without a gradient take part in the next draw, so that one draw number serves the group.
            self._members(index, [params[i] for i in drawn if i not in done]).sample(tensor)
        held.wrote(params, drawn)

    def _take(
        self,
        index: int,
        params: list[Tensor],
        counters: Tensor,
        completes: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        splits: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """Accumulate the gradients of ``params`` or update with them; returns the KL of what is here."""
        group, device = self.param_groups[index], counters.device
        grad_scale = None if grad_scale is None else grad_scale.to(device)
        members = self._members(index, params)
        if group["statistic"] == "gauss-newton":
            members.gauss_newton(counters, ops.Amp(grad_scale, found_inf))
            return None
        skips = (found_inf, found_inf) if splits is None else splits
        if splits is not None or not completes or self._sample_group is not None:
            if mixed := [p for p in params if self._position[p] in self._held[index].mixed]:
                self._members(index, mixed).sample(counters)
            members.accumulate(counters, ops.Amp(grad_scale, skips[0]))
        if splits is None and not completes:
            return None
        names = [] if self._prior is None else [group["param_names"][self._position[p]] for p in params]
        scalars = self._scalar(index, "lr", device), self._scalar(index, "kl_weight", device)
        amp = ops.Amp(grad_scale, skips[1])
        return members.step(counters, scalars, self._prior, names, amp, self._sample_group)

    @torch.no_grad()
    def _release(self, index: int, p: Tensor) -> None:
        """Take a gradient that backward has completed."""
        held, released, counters = self._held[index], self._released[index], self._counters[index]
        position = self._position[p]
        check_first(released, p)
        options.check_gradients(self.param_groups[index])
        if held.drawn is None or position in held.drawn:
            if not any(r.pending for r in self._released):
                self._take_over()
            end = fork(counters.on(p.device))
            kl = self._take(index, [p], end, counters.completes)
            held.note_one(position, p)
            released.pending.append((p, end, kl if self._prior is not None else None))
        p.grad = None

    def _agree(self, found_inf: Tensor | None) -> tuple[bool, set[int]]:
        """Whether a gradient overflowed on any rank of ``sample_group``, and what has a gradient on any of them."""
        params = [p for group in self.param_groups for p in group["params"]]
        flags = torch.tensor([False, *(p.grad is not None for p in params)], dtype=torch.int32, device=params[0].device)
        if found_inf is not None:
            flags[0] = found_inf.to(flags.device).reshape(()) != 0
        overflow, *present = largest(flags, [self._sample_group]).tolist()
        return bool(overflow), {id(p) for p, there in zip(params, present, strict=True) if there}

    @torch.no_grad()
    def _draw(self, index: int) -> None:
        """Write a group's current sample into its parameters."""
        group, held, counters = self.param_groups[index], self._held[index], self._counters[index]
        params, drawn = group["params"], held.drawn
        if drawn != (learnable := learnable_positions(params)):
            first = drawn is None or counters.phase() == 0
            drawn = learnable if first else [i for i in drawn or () if params[i].requires_grad]
        if drawn:
            options.check_devices(group, self.state)
            self._members(index, [params[i] for i in drawn]).sample(counters.on(params[0].device))
        held.wrote(params, drawn)

    def _check_groups(self) -> None:
        """Refuse what was written to the groups; before the first draw it may be shards, as accelerate puts there."""
        if not torch.compiler.is_compiling():
            if not (self.state or self._release_gradients) and options.are_replaced(self.param_groups, self._watched):
                self._reset()
            options.check_groups(self.param_groups, self._watched, self._counters)

    @torch.no_grad()
    def _take_over(self, *, strict: bool = True) -> None:
        """Let the means be what was written to the parameters since the optimizer wrote them last."""
        for index, (group, held) in enumerate(zip(self.param_groups, self._held, strict=False)):
            written = held.written(group["params"], self.state)
            for i in written:
                p = group["params"][i]
                if p not in self.state or (mean := local(self.state[p]["mean"])).device != p.device:
                    continue  # `options.check_devices` tells of a model that was moved
                if held.sampled and (held.drawn is None or i in held.drawn):
                    expected = self._members(index, [p]).expected(self._counters[index].on(p.device))[0]
                else:
                    expected = mean.to(p.dtype)
                take_over(labels_of(group)[i], p, expected, mean, strict=strict)
            if written:
                held.note(group["params"])

    def _note_first(self) -> None:
        """Means that are copies of the weights are theirs from now on, before any draw."""
        for group, held, initial in zip(self.param_groups, self._held, self._initial, strict=True):
            if held.drawn is None and not isinstance(initial, Posterior):
                held.note(group["params"])

    def _separate_pair(self, index: int, seed: int) -> list[Tensor]:
        """Make ready for a second sample that is not the first's antithetic; returns whose states got an ``m2``."""
        counters, params = self._counters[index], self.param_groups[index]["params"]
        if not counters.in_pairs or counters.phase() == 0:
            return []
        found = [p for p in params if "m1" in self.state.get(p, {}) and "m2" not in self.state[p]]
        if found:
            self._members(index, found).separate(counters.on(found[0].device), seed)
        return found

    def _drop_sums(self, params: Sequence[Tensor]) -> None:
        """Go on in pairs, which need no ``m2``."""
        for p in params:
            self.state.get(p, {}).pop("m2", None)

    def _members(self, index: int, params: list[Tensor]) -> Members:
        group = self.param_groups[index]
        streams = [group["first_stream"] + self._position[p] for p in params]
        states = [self.state[p] or self._state(index, p) for p in params]
        return Members(group, params, states, streams, self._counters[index].in_pairs)

    def _state(self, index: int, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            group, initial = self.param_groups[index], self._initial[index]
            if isinstance(initial, Posterior):
                mean, std = initial.fetch(group["param_names"][self._position[p]], p.device)
                state["mean"], state["std"] = shard_like(mean, p).clone(), shard_like(std, p).clone()
            else:
                state["mean"] = torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(p)
                start = initial[group["param_names"][self._position[p]]] if isinstance(initial, dict) else initial
                state["std"] = torch.full_like(state["mean"], start)
        return state

    def _fill_state(self) -> None:
        for index, p in self._learnable():
            state = self._state(index, p)
            if self._has_statistics(self.param_groups[index]):
                add_statistics(state, self._counters[index].in_pairs)
        self._note_first()

    def _learnable(self) -> Iterator[tuple[int, Tensor]]:
        """The parameters of the posterior, each with its group's index."""
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    yield index, p

    def _scalar(self, index: int, name: str, device: torch.device) -> Tensor:
        """A group's option as a float32 scalar tensor on the device, written only when it changed."""
        value = self.param_groups[index][name]
        if isinstance(value, Tensor):
            # A copy to a GPU is queued: it must not wait for the steps before it.
            return value.to(device, torch.float32, non_blocking=device.type != "cpu").reshape(())
        cached = self._scalars.get((index, name))
        if cached is None or cached[0] != value:
            tensor = cached[1] if cached is not None else torch.empty((), dtype=torch.float32, device=device)
            tensor.fill_(value)
            self._scalars[index, name] = cached = (value, tensor)
        return cached[1]

    def _has_statistics(self, group: dict[str, Any]) -> bool:
        return group["mc_samples"] > 1 or self._sample_group is not None

    @torch.no_grad()
    def _kl_of(self, index: int, p: Tensor) -> tuple[Tensor, Tensor]:
        """The KL of what this rank holds of a parameter."""
        assert self._prior is not None
        group, state = self.param_groups[index], self._state(index, p)
        prior = self._prior.fetch(group["param_names"][self._position[p]], p.device)
        pieces = Pieces([p], [0])
        lists = [pieces.of([t]) for t in (state["mean"], state["std"], *prior)]
        if not lists[0]:
            return torch.zeros((), dtype=torch.float64, device=p.device), p
        return ops.gaussian_kl(*lists, backend=group["backend"])[0], p

    def raise_if_nonfinite(self) -> None:
        """Raise if an update since the last call was refused because it was not finite; waits for the device.

        Where parameters are sharded or ``sample_group`` is given, all ranks call it and all raise.

        Raises:
            NonFiniteError: says after which update, and names the parameters whose gradient is not finite now.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [*groups_of(params), *([] if self._sample_group is None else [self._sample_group])]
        flags = [c.read() for c in self._counters]
        if groups:
            device = local(params[0]).device
            flags = largest(torch.tensor(flags, dtype=torch.int32, device=device), groups).tolist()
        flagged = [i for i, flag in enumerate(flags) if flag]
        if not flagged:
            return
        labels, bad = [], []
        for i in flagged:
            if (counters := self._counters[i].tensor) is not None:
                counters[2] = 0
            labels += labels_of(self.param_groups[i])
            refused = [p for p, end, _ in self._released[i].last if end[2].item()]
            bad += [
                (p.grad is not None and not local(p.grad).isfinite().all()) or any(p is q for q in refused)
                for p in self.param_groups[i]["params"]
            ]
        if groups:
            bad = largest(torch.tensor(bad, dtype=torch.int32, device=device), groups).tolist()
        names = [label for label, is_bad in zip(labels, bad, strict=True) if is_bad]
        where = f"the gradient of {', '.join(names[:5])}" if names else "an update"
        raise NonFiniteError(
            f"{where} is NaN or infinite (found after update {self._counters[flagged[0]].updates()}); the elements "
            "concerned kept their mean and std. Lower lr or std_init, or look for the cause in the loss"
        )

    def _set_training(self, training: bool) -> None:
        self._training = training
        for group in self.param_groups:
            group["training"] = training

    def _mark_gradients(self, mark: object) -> list[int]:
        """Mark the gradients there are, so that `_gradients_since` tells whether backward has added to them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad._distruction_mark = mark
        return self._gradient_versions()

    def _gradients_since(self, mark: object, before: list[int]) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        unmarked = any(getattr(grad, "_distruction_mark", None) is not mark for grad in grads)
        return (
            unmarked
            or bool(grads and before != self._gradient_versions())
            or any(released.pending for released in self._released)
        )

    def _gradient_versions(self) -> list[int]:
        return [p.grad._version for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _reset(self) -> None:
        """Forget what was derived from the groups and the state."""
        self._counters, self._held, self._released, self._watched = [], [], [], []
        self._scalars, self._position = {}, {}
        for group in self.param_groups:
            self._append(group)

    def _append(self, group: dict[str, Any]) -> None:
        own = self._sample_group
        rank, size = (0, 1) if own is None else (dist.get_rank(own), dist.get_world_size(own))
        self._counters.append(Counters(group, lead=rank, samplers=size))
        self._held.append(Held())
        self._released.append(Released())
        self._watched.append(options.Watched(group))
        self._position |= {p: i for i, p in enumerate(group["params"])}


def learnable_positions(params: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters that are not frozen."""
    return [i for i, p in enumerate(params) if p.requires_grad]
