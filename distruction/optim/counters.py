"""The Monte Carlo phase of a parameter group: which sample of an update is due, and the draw number that made it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Counters:
    """One owner of a group's phase and draw number, on the device and on the host.

    The device is right: its tensor (draw number, samples taken since the last update, whether an update was refused)
    is read and advanced by the ops, which do nothing where a GradScaler found an overflow. A skipped call so leaves
    draw, statistics and phase as they were: the sample stays due, and antithetic pairs stay pairs.

    The host counts along in the group's ``calls`` to choose between ``accumulate`` and ``step``. That needs no word
    from the device as long as no call can be skipped behind its back. Where one can (``found_inf`` on a GPU or in a
    compiled step, and several samples an update) the device chooses: both ops are queued, one of which `split` makes
    skip, by arithmetic on the tensor that waits for nobody and that a CUDA graph captures. From then on the host does
    not know the phase (``known``), until `read` asks for it.

    Args:
        group: the parameter group, with the options and the progress of a run.
        lead: samples of an update that other ranks draw before this one.
        samplers: ranks that each draw ``mc_samples`` samples of an update.
    """

    def __init__(self, group: dict[str, Any], *, lead: int = 0, samplers: int = 1) -> None:
        self.group = group
        self._in_pairs = samplers == 1 and _samples_a_pair(group) and (group["draw"] - group["accumulated"]) % 2 == 0
        self.samplers = samplers
        self.tensor: Tensor | None = None
        self.known = True
        self._lead = lead * group["mc_samples"]

    @property
    def in_pairs(self) -> bool:
        """Whether every update takes one antithetic pair, draws 2i and 2i + 1; not once the options have changed."""
        if self._in_pairs and not _samples_a_pair(self.group):
            self._in_pairs = False
        return self._in_pairs

    def on(self, device: torch.device) -> Tensor:
        """The device's tensor, made where it is first asked for."""
        if self.tensor is None:
            draw = self.group["draw"] + self._lead
            self.tensor = torch.tensor([draw, self.group["accumulated"], 0], device=device)
        return self.tensor

    @property
    def completes(self) -> bool:
        """Whether the sample that is due completes an update, as far as the host knows."""
        return bool(self.group["calls"] + 1 >= self.group["mc_samples"])

    def count(self) -> None:
        """Count a call on the host."""
        self.group["calls"] = 0 if self.completes else self.group["calls"] + 1

    def phase(self) -> int:
        """Samples of the update under way that this rank has taken; waits for the device if the host lost count."""
        if not self.known:
            self.read()
        return int(self.group["calls"])

    def read(self) -> bool:
        """Bring the group's progress up to date, waiting for the device; returns whether an update was refused."""
        if self.tensor is None:
            return False
        draw, accumulated, refused = self.tensor.tolist()
        self.group["draw"], self.group["accumulated"] = draw - self._lead, accumulated
        if self.samplers == 1:
            self.group["calls"] = accumulated
        self.known = True
        return bool(refused)

    def updates(self) -> int:
        """Updates made so far, told by the draws that they used; up to date after `read`."""
        return int(self.group["draw"] // (self.group["mc_samples"] * self.samplers))

    def split(self, found_inf: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """A ``found_inf`` for ``accumulate`` and one for ``step``: at most one of the two ops goes on."""
        completes = self.on(device)[1:2] + 1 >= self.group["mc_samples"]
        skips = torch.zeros_like(completes) if found_inf is None else found_inf.reshape(1).to(device) != 0
        return (skips | completes).float(), (skips | ~completes).float()


def _samples_a_pair(group: dict[str, Any]) -> bool:
    return bool(group["antithetic"]) and group["mc_samples"] == 2


def fork(counters: Tensor) -> Tensor:
    """Counters for a part of a group, which starts from the same draw."""
    own = counters.clone()
    own[2] = 0
    return own


def join(counters: Tensor, ends: Sequence[Tensor]) -> None:
    """Advance a group's counters to where its parts ended: they agree but for the flag of a refused update."""
    flag = counters[2].clone()
    counters.copy_(torch.stack(list(ends)).amax(0))
    counters[2] |= flag


def advance(counters: Tensor, completes: bool, found_inf: Tensor | None) -> None:
    """What an op does to ``counters``, for a call without tensors."""
    taken = 1 if found_inf is None else (found_inf.reshape(()) == 0).long()
    counters[0] += taken
    counters[1] = counters[1] * (1 - taken) if completes else counters[1] + taken
