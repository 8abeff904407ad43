"""What of a `BGD` is saved, copied and taken over again."""

from typing import Any

import torch

from ..errors import UsageError
from ..posterior import Posterior
from ..sharding import shard_like
from .groups import Groups
from .release import release_from
from .state import checked, saved_states


class Saved(Groups):
    """`Groups` with a state_dict that a resumed run goes on from with the same bits."""

    _std_init: float | dict[str, float] | Posterior
    _streams: int

    def train(self) -> None:
        """Let the parameters hold the current sample."""
        raise NotImplementedError

    def eval(self, *, check: bool = True) -> None:
        """Let the parameters hold the means."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs: means, stds, statistics, draw numbers and options.

        The prior is not in it: pass the same one when the optimizer is made again.
        """
        if self._sample_group is not None and any(group["calls"] for group in self.param_groups):
            raise UsageError(
                "between the samples of one update each rank holds statistics of its own (sample_group): take the "
                "state_dict after the update"
            )
        self._synchronize()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict`; the parameters then hold what they held when it was made (sample or means).

        Options that the state lacks, because it is of an older version, stay as they are.

        Raises:
            UsageError: the state is not of a BGD, of another statistic, or of other parameters; nothing has changed.
        """
        final: dict[str, Any] = {}
        params = [p for group in self.param_groups for p in group["params"]]

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            final.update(
                checked(
                    self.param_groups,
                    list(self.defaults),
                    self.defaults["statistic"],
                    given,
                    self._sample_group is None,
                )
            )
            return final

        def adopt(_: torch.optim.Optimizer) -> None:
            # torch casts state to the parameter's dtype; ours is float32 whatever the parameter is.
            for p, state in saved_states(params, final):
                for key, value in state.items():
                    placed = shard_like(value, p)
                    self.state[p][key] = placed.clone() if placed is value else placed
            self._reset()
            if self.param_groups[0]["training"]:
                self.train()
            else:
                self.eval(check=False)

        # The last hook before and the first one after: the caller's own may change the state, and find it taken over.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(adopt, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        if self._sample_group is not None:
            raise UsageError("an optimizer with sample_group cannot be copied or pickled; copy its state_dict")
        self._synchronize()
        keys = ("_std_init", "_initial", "_prior", "_training", "_now", "_streams", "_release_gradients")
        return {**super().__getstate__(), **{k: getattr(self, k) for k in keys}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        # torch also calls this from load_state_dict, where the sample group stays and the hooks are there.
        made_anew = "_initial" in state
        if made_anew:
            self._sample_group = None
        self._reset()
        if made_anew and self._release_gradients:
            for index in range(len(self.param_groups)):
                release_from(self, index)

    def _synchronize(self) -> None:
        """Bring the groups and the state up to date with the device and with what was written."""
        if any(released.pending for released in self._released):
            raise UsageError("backward has updated a part of the model (release_gradients): call step() first")
        self._take_over()
        self.raise_if_nonfinite()
