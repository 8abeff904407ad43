"""What a `BGD` can be told: one row per option, the same for the constructor and for a parameter group."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import ops
from ..errors import UsageError
from ..modules import unsuitable
from ..posterior import Posterior
from ..sharding import is_sharded

if TYPE_CHECKING:
    from .counters import Counters


@dataclass(frozen=True)
class Option:
    """An option.

    Attributes:
        name: as the constructor and a group spell it.
        is_valid: whether a value may be taken.
        must: what the error says of values that may not, after "{name} must be".
        of_group: whether a group may have its own.
    """

    name: str
    is_valid: Callable[[Any], bool]
    must: str
    of_group: bool = True


def _scalar(within: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A number, or a tensor of one element, whose value is not read: it may be on a GPU."""
    return lambda value: value.numel() == 1 if isinstance(value, Tensor) else within(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)


def _is_positive(value: Any) -> bool:
    return bool(value > 0)


def _is_initial_std(value: Any) -> bool:
    if isinstance(value, dict):
        return all(0 < std < math.inf for std in value.values())
    return isinstance(value, Posterior) or 0 < value < math.inf


_TRUTH = "True or False"
STATISTICS = ("bgd", "gauss-newton")

OPTIONS = {
    option.name: option
    for option in (
        Option("lr", _scalar(lambda v: 0 <= v < math.inf), ">= 0 and finite"),
        Option("std_init", _is_initial_std, "> 0 and finite"),
        Option("data_per_step", _is_positive, "> 0"),
        Option("mc_samples", lambda v: _is_integer(v) and v >= 1, "an integer >= 1"),
        Option("antithetic", _is_flag, _TRUTH),
        Option("prior", lambda v: v is None or isinstance(v, Posterior), "a Posterior or None", of_group=False),
        Option("kl_weight", _scalar(lambda v: 0 <= v <= 1), "(lambda) in [0, 1]"),
        Option("max_mean_step", _is_positive, "> 0"),
        Option("max_log_std_step", _is_positive, "> 0"),
        Option("max_std", _is_positive, "> 0"),
        Option("learn_mean", _is_flag, _TRUTH),
        Option("learn_std", _is_flag, _TRUTH),
        Option("at_means", _is_flag, _TRUTH, of_group=False),
        Option("stochastic_rounding", _is_flag, _TRUTH),
        Option("maximize", _is_flag, _TRUTH),
        Option("seed", lambda v: _is_integer(v) and -(2**63) <= v < 2**63, "an integer of 64 bits, signed"),
        Option("backend", lambda v: v in ("auto", *ops.MODULES), f"one of auto, {', '.join(ops.MODULES)}"),
        Option("first_stream", lambda v: _is_integer(v) and 0 <= v < 2**32, "an integer in [0, 2**32)"),
        Option("sample_group", lambda v: True, "a process group", of_group=False),
        Option("release_gradients", _is_flag, _TRUTH, of_group=False),
        Option("statistic", lambda v: v in STATISTICS, f"one of {', '.join(STATISTICS)}", of_group=False),
    )
}
"""By name. Those that are not of a group are one for all groups."""

PROGRESS = ("draw", "accumulated", "calls", "first_stream", "training")
"""What a group says of the run, besides its options."""

ANNOTATIONS = (
    *("params", "param_names", "name", "group_name"),
    *("initial_lr", "lr_scale", "lr_mult", "swa_lr", "min_lr", "max_lr"),
)
"""Keys of a group that schedulers and factories of groups write for themselves."""

_ALWAYS_FUSED = "its step is always one fused op; choose an implementation with backend="
REFUSED = {
    "foreach": _ALWAYS_FUSED,
    "fused": _ALWAYS_FUSED,
    "capturable": "its step on a GPU never waits for the host, so there is nothing to switch on; leave it out",
    "differentiable": "its step cannot be differentiated; for gradients with respect to std use GaussianKL",
    "weight_decay": "weights are held by the posterior and, with prior= and kl_weight=, by the KL; leave it out or 0",
    "momentum": "the posterior's precision takes its place; leave it out or 0",
}
"""Options of other optimizers, and what BGD has instead."""


def check_names(given: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Refuse names that are no option, but for other optimizers' that are switched off.

    A factory gives every optimizer the same options, as timm's does.
    """
    for name, value in given.items():
        if name not in known and not (name in REFUSED and not value):
            raise UsageError(f"BGD has no option {name!r}: {REFUSED.get(name, 'see help(BGD) for those it has')}")


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with integers of other libraries, such as NumPy's, as Python's, which the ops and files take."""
    return {name: int(v) if _is_integer(v) else v for name, v in given.items()}


def check_values(given: Mapping[str, Any]) -> None:
    """Refuse values that an option cannot take."""
    for name, option in OPTIONS.items():
        if name not in given:
            continue
        value = given[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UsageError(f"Tensor {name} must be 1-element, not of shape {tuple(value.shape)}")
        try:
            valid = option.is_valid(value)
        except (TypeError, RuntimeError):
            valid = False
        if name == "data_per_step" and value == math.inf:
            raise UsageError("data_per_step must be finite; give the number of data points a step stands for")
        if not valid:
            label = f"{name} (lambda)" if name == "kl_weight" else name
            must = option.must.removeprefix("(lambda) ")
            raise UsageError(f"{label} must be {must}, not {value!r}")


def check_own(group: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Refuse what a group may not have: unknown keys, and values of its own where one serves all groups."""
    of_group = [name for name, option in OPTIONS.items() if option.of_group]
    for name, option in OPTIONS.items():
        if not option.of_group and name in group and not (name in common and group[name] == common[name]):
            raise UsageError(f"{name} is one for all groups: give it to BGD, not to a group")
    check_names(group, (*of_group, *common, *PROGRESS, *ANNOTATIONS))


def check_weight(weight: float | Tensor | None, prior: Posterior | None) -> float | Tensor:
    """The KL weight, which comes with a prior and a prior with it; 0 may be meant, as the start of a schedule."""
    if weight is None:
        if prior is not None:
            raise UsageError("prior needs kl_weight= (lambda in [0, 1]); 0 if a schedule is to raise it")
        return 0.0
    if prior is None and (isinstance(weight, Tensor) or weight != 0):
        raise UsageError("kl_weight needs prior=, the posterior that the KL is taken to; leave it out without one")
    return weight


_GAUSS_NEWTON = {"learn_mean": False, "learn_std": True, "mc_samples": 1, "prior": None, "sample_group": None}
_AT_MEANS = {"statistic": "bgd", "learn_std": False, "mc_samples": 1, "sample_group": None}


def check_kind(options: Mapping[str, Any]) -> None:
    """Refuse what does not go with the Gauss-Newton statistic, or with gradients at the means."""
    if options["statistic"] == "gauss-newton":
        reason = "it learns the stds around given means, from one gradient a step"
        _check_needs('statistic="gauss-newton"', _GAUSS_NEWTON, options, f'{reason}; statistic="bgd" has the rest')
    if options["at_means"]:
        reason = "a gradient at the means says nothing about the stds, and there is one of it"
        _check_needs("at_means", _AT_MEANS, options, f"{reason}; leave at_means out for samples")


def _check_needs(what: str, needs: Mapping[str, Any], options: Mapping[str, Any], why: str) -> None:
    for name, needed in needs.items():
        if name in options and options[name] != needed:
            raise UsageError(f"{what} needs {name}={needed!r}: {why}")


def check_parameters(group: Mapping[str, Any], sources: Mapping[str, Any], sample_group: Any) -> None:
    """Refuse parameters that BGD cannot take.

    Args:
        group: with ``params`` and, if they have some, ``param_names``.
        sources: what goes by parameter names, if it is a `Posterior`.
        sample_group: the process group whose ranks draw samples of their own.
    """
    params, names = group["params"], group.get("param_names")
    for what, source in sources.items():
        if isinstance(source, Posterior):
            if names is None:
                raise UsageError(f"{what} goes by parameter names: pass model.named_parameters() to BGD")
            for name, p in zip(names, params, strict=True):
                if p.requires_grad and source.shapes.get(name) != p.shape:
                    raise UsageError(f"{what} has no parameter {name} of shape {tuple(p.shape)}; is it of this model?")
        elif isinstance(source, dict) and (names is None or not set(names) <= set(source)):
            lacking = next((name for name in names or () if name not in source), "names in its parameters")
            raise UsageError(f"stds by name as std_init want a named parameter each: there is none for {lacking}")
    for label, p in zip(labels_of(group), params, strict=True):
        if p.is_complex():
            raise UsageError(f"parameter {label} is complex; BGD is defined for real weights")
        _check_kept(label, p, group["backend"])
        if sample_group is not None and is_sharded(p):
            sampling = set(dist.get_process_group_ranks(sample_group))
            if len(shared := sampling.intersection(p.device_mesh.mesh.flatten().tolist())) > 1:
                raise UsageError(
                    f"parameter {label} is spread over ranks {sorted(shared)} of sample_group, so that they must hold "
                    "one sample; leave sample_group out, or name a group across the shards"
                )
    check_devices(group, {})


_USUAL = (torch.float32, torch.bfloat16, torch.float16)


def _check_kept(label: str, p: Tensor, backend: str) -> None:
    """Refuse a learnable parameter that no op of the backend can write; the reference takes any floating type."""
    if not p.requires_grad or p.is_meta or (fault := unsuitable(p)) is None:
        return
    if p.dtype in _USUAL or ops.resolve(backend, p.device.type) is not ops.resolve("reference", p.device.type):
        raise UsageError(f"{label} {fault}")


def check_gradients(group: Mapping[str, Any]) -> None:
    """Refuse gradients that are not dense."""
    for i, p in enumerate(group["params"]):
        if p.grad is not None and p.grad.is_sparse:
            raise UsageError(
                f"the gradient of {labels_of(group)[i]} is sparse; BGD needs dense gradients (sparse=False)"
            )


def largest_std(initial: float | dict[str, float] | Posterior) -> float:
    """The largest of the initial stds."""
    if isinstance(initial, Posterior):
        return initial.largest_std()
    return max(initial.values()) if isinstance(initial, dict) else float(initial)


class Watched:
    """What a group was when it was checked last: its parameters, and its options.

    Args:
        group: checked.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._params = [id(p) for p in group["params"]]
        self._options = {name: group[name] for name, option in OPTIONS.items() if option.of_group and name in group}

    @property
    def size(self) -> int:
        """How many parameters there were."""
        return len(self._params)

    def has(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters."""
        return [id(p) for p in params] == self._params

    def check(self, group: Mapping[str, Any], phase: Callable[[], int]) -> None:
        """Check what was written to the group since.

        Args:
            phase: tells how many samples of an update are taken; may wait for the device.

        Raises:
            UsageError: an option is out of range or cannot change now, or the parameters are others.
        """
        if not self.has(group["params"]):
            raise UsageError(
                "the list of a group's parameters was changed by hand: add parameters by add_param_group, take them "
                "out by requires_grad_(False), or make another optimizer and give it this one's state_dict()"
            )
        changed = {name: group[name] for name, value in self._options.items() if group[name] is not value}
        if not changed:
            return
        check_values(changed)
        for name in ("mc_samples", "antithetic"):
            if name in changed and changed[name] != self._options[name] and (taken := phase()):
                raise UsageError(
                    f"{name} cannot become {changed[name]} after {taken} of the {self._options['mc_samples']} samples "
                    "of an update: change it after the step that completes the update"
                )
        self._options.update(changed)


def are_replaced(groups: Sequence[Mapping[str, Any]], watched: Sequence[Watched]) -> bool:
    """Whether other parameters, as many, stand in the places of those that were checked last."""
    if [len(group["params"]) for group in groups] != [w.size for w in watched]:
        return False
    return not all(w.has(group["params"]) for group, w in zip(groups, watched, strict=True))


def check_groups(
    groups: Sequence[Mapping[str, Any]], watched: Sequence[Watched], counters: Sequence["Counters"]
) -> None:
    """Refuse what was written to the groups since they were checked last and cannot be."""
    if len(groups) != len(watched):
        raise UsageError(
            f"param_groups has {len(groups)} groups and had {len(watched)}: add one by add_param_group; to leave one "
            "out, freeze its parameters by requires_grad_(False)"
        )
    for group, known, counter in zip(groups, watched, counters, strict=True):
        known.check(group, counter.phase)


def check_devices(group: Mapping[str, Any], states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Refuse a group that is spread over devices, or whose model was moved away from its means and stds."""
    first: dict[torch.device, str] = {}
    for label, p in zip(labels_of(group), group["params"], strict=True):
        first.setdefault(p.device, label)
        if p.dtype not in _USUAL:
            _check_kept(label, p, group["backend"])
        if p in states and (there := states[p]["mean"].device) != p.device:
            raise UsageError(
                f"{label} is on {p.device} and its mean and std on {there}: move the model before the "
                "optimizer's first train(), or make another optimizer and give it this one's state_dict()"
            )
    if len(first) > 1:
        places = ", ".join(f"{label} on {device}" for device, label in first.items())
        raise UsageError(
            f"a group's parameters are on one device, and here {places}; make one group for each device: "
            'BGD([{"params": ...}, {"params": ...}])'
        )


def labels_of(group: Mapping[str, Any]) -> list[str]:
    """The parameters of a group by name or, without names, by position."""
    return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
