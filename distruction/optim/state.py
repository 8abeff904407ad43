"""What a `BGD` takes over: another optimizer's state, and what somebody else wrote to the parameters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, UsageError
from ..sharding import are_ordinary, is_sharded, local
from .options import PROGRESS, STATISTICS, labels_of


class Held:
    """What a group's parameters hold by the optimizer's last word.

    Attributes:
        drawn: positions of the parameters that take part in the current sample, in the group's order;
            ``None`` before the first draw, and in a copy that was made of an optimizer: all that are not frozen.
        sampled: whether those hold the sample; else, as all others, the mean.
        mixed: positions of those that somebody else has written to since; their samples are not whole.
    """

    def __init__(self) -> None:
        self.drawn: list[int] | None = None
        self.sampled = False
        self.mixed: set[int] = set()
        self._marks: list[tuple[int, int]] = []
        self._types: list[torch.dtype] = []

    def wrote(self, params: Sequence[Tensor], drawn: list[int] | None) -> None:
        """The optimizer has written all parameters: those at ``drawn`` hold the sample, or all their means."""
        if self.mixed:
            self.mixed = set()
        self.sampled = drawn is not None
        if drawn is not None:
            self.drawn = drawn
        self.note(params)

    def note(self, params: Sequence[Tensor]) -> None:
        """Remember that the parameters hold what the optimizer wrote; a compiled step leaves that to a comparison."""
        if not torch.compiler.is_compiling():
            self._marks = _marks(params)
            self._types = [p.dtype for p in params]

    def note_one(self, position: int, p: Tensor) -> None:
        """Likewise of one parameter."""
        if self._marks:
            self._marks[position] = _marks([p])[0]

    def written(self, params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]]) -> list[int]:
        """Positions of parameters that may hold something else by now.

        PyTorch counts what is written to a parameter, but not what is written to ``p.data`` or to an array that shares
        its memory. Means on the CPU are therefore compared, and float32 means elsewhere copied, which needs no answer;
        samples would have to be drawn again for that. A parameter that was converted to another type holds nothing
        else: it gets its mean in that type.
        """
        if torch.compiler.is_compiling() or not self._marks:
            return []
        found = _marks(params)
        changed = [i for i, (now, then) in enumerate(zip(found, self._marks, strict=True)) if now != then]
        converted = {i for i in changed if params[i].dtype != self._types[i]}
        if self.sampled:
            self.mixed.update(changed)
            return [i for i in changed if i not in converted]
        for i in converted:
            if params[i] in states:
                local(params[i]).copy_(local(states[params[i]]["mean"]))
        if converted:
            self.note(params)
        away = [p for i, p in enumerate(params) if i not in changed and p in states and _is_copied(p)]
        if away:
            torch._foreach_copy_([local(states[p]["mean"]) for p in away], [local(p) for p in away])
        return [
            i
            for i, p in enumerate(params)
            if i not in converted and (found[i] != self._marks[i] or (p in states and _differs(p, states[p]["mean"])))
        ]


def _is_copied(p: Tensor) -> bool:
    return p.device.type != "cpu" and p.dtype == torch.float32


def _differs(p: Tensor, mean: Tensor) -> bool:
    held, expected = local(p), local(mean)
    return held.device.type == expected.device.type == "cpu" and not torch.equal(held, expected.to(held.dtype))


def _marks(params: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes with a parameter: the version of its values, and the memory that they are in."""
    tensors = params if are_ordinary(params) else [local(p) for p in params]
    return [(p._version, p.untyped_storage()._cdata) for p in tensors]


def take_over(label: str, p: Tensor, expected: Tensor, mean: Tensor, *, strict: bool) -> None:
    """Make those elements of ``p`` the mean that are not as the optimizer left them, ``expected``.

    Raises:
        NonFiniteError: one is NaN or infinite, and ``strict``; else it is passed over. The mean has not changed.
    """
    held = local(p)
    written = held != expected
    finite = held.isfinite()
    if strict and bool((written & ~finite).any()):
        raise NonFiniteError(
            f"NaN or infinity was written to {label} since the optimizer's last step; write finite weights there "
            "before going on"
        )
    mean.copy_(torch.where(written & finite, held.to(mean.dtype), mean))


def saved_states(params: Sequence[Tensor], state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The parameters and what ``state_dict`` holds of each; as many as there are of both."""
    indices = (i for group in state_dict["param_groups"] for i in group["params"])
    for p, index in zip(params, indices, strict=False):
        yield p, state_dict["state"].get(index, {})


def _check_order(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the same names in another order, which torch would give to each other's parameters."""
    if not all("param_names" in group for group in (*groups, *saved_groups)):
        return
    mine, theirs = ([name for g in some for name in g["param_names"]] for some in (groups, saved_groups))
    if mine != theirs and sorted(mine) == sorted(theirs):
        here, there = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
        raise UsageError(
            f"the state has the parameters in another order, {there} where the optimizer has {here}: make the "
            "optimizer with its parameters in the state's order"
        )


def checked(
    groups: Sequence[dict[str, Any]], options: Sequence[str], statistic: str, state_dict: dict[str, Any], alone: bool
) -> dict[str, Any]:
    """The state with every option, if an optimizer of these groups can take it over; else an error.

    Args:
        groups: the optimizer's.
        options: names of what a group has; those that the state lacks stay as they are.
        statistic: the optimizer's.
        state_dict: what is to be loaded.
        alone: whether an update's samples are all this rank's.

    Raises:
        UsageError: it is not of a BGD, of another statistic, or of other parameters.
    """
    saved_groups = state_dict["param_groups"]
    if any(name not in group for group in saved_groups for name in PROGRESS):
        raise UsageError(
            f"the state_dict is not of a BGD, whose groups have {', '.join(PROGRESS)}; load one that "
            "BGD.state_dict() has made"
        )
    for group in saved_groups:
        if (theirs := group.get("statistic", STATISTICS[0])) != statistic:
            raise UsageError(
                f'the state is of statistic="{theirs}" and the optimizer of statistic="{statistic}", whose stds mean '
                "something else; make the optimizer with the state's"
            )
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return state_dict  # torch says so
    _check_order(groups, saved_groups)
    labels = [label for group in groups for label in labels_of(group)]
    params = [p for group in groups for p in group["params"]]
    for label, (p, state) in zip(labels, saved_states(params, state_dict), strict=True):
        if any(is_sharded(t) and not is_sharded(p) for t in state.values()):
            raise UsageError(
                "the state is sharded and the parameters are not: save it with torch.distributed.checkpoint's "
                "get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True))"
            )
        if state and not {"mean", "std"} <= state.keys():
            raise UsageError(f"the state of {label} has no mean and std, only {', '.join(state)}")
        for key, value in state.items():
            if value.shape != p.shape:
                raise UsageError(
                    f"the state's {key} of {label} has shape {tuple(value.shape)} and the parameter "
                    f"{tuple(p.shape)}; is it of this model, with its parameters in this order?"
                )
    own = ({k: group[k] for k in options if k in group} for group in groups)
    merged = [mine | saved for mine, saved in zip(own, saved_groups, strict=True)]
    for group in merged:
        held = [state_dict["state"].get(i, {}) for i in group["params"]]
        if group["accumulated"] and not any("m1" in state for state in held):
            raise UsageError(
                f"the state was saved after {group['accumulated']} of {group['mc_samples']} samples of an update, "
                "but their statistics are not in it; load it before the optimizer's first train()"
            )
        pair = alone and group["mc_samples"] == 2 and group["antithetic"]
        if group["accumulated"] and not pair and any("m1" in state and "m2" not in state for state in held):
            raise UsageError(
                "the state was saved between the samples of an antithetic pair, of which it holds the first gradient; "
                "load it with mc_samples=2, antithetic=True and no sample_group, or save it after an update"
            )
        # The statistics know; an older version's host lost count where a gradient overflowed.
        group["calls"] = group["accumulated"]
    return {**state_dict, "param_groups": merged}
