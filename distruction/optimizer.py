"""Bayesian Gradient Descent as a ``torch.optim`` optimizer.

Zeno, Golan, Hoffer, Soudry, "Task Agnostic Continual Learning Using Online Variational Bayes", arXiv
1803.10123; with ``prior`` and ``kl_weight`` it minimises DiStruction's forgetting objective. The formulas are
in `distruction.ops.reference.step`.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from . import distributed, ops
from .distributed import all_reduce_
from .errors import NonFiniteError, UsageError
from .posterior import Posterior
from .sharding import Pieces, groups_of, is_sharded, largest, layout, local, shard_like, sum_over_shards

STREAMED_ELEMENTS = 2**24
"""Elements of a prior that is not at hand in float32 which are restored at a time, in whole tensors: 64 MiB each for
mean and std."""

_POSITIVE = ("data_per_step", "max_mean_step", "max_log_std_step", "max_std")
_PROGRESS = ("draw", "accumulated", "calls", "first_stream", "training")
"""What a group says of the run, besides its options."""
_ALWAYS_FUSED = "its step is always one fused op; choose an implementation with backend="
_REFUSED = {
    "foreach": _ALWAYS_FUSED,
    "fused": _ALWAYS_FUSED,
    "capturable": "its step on a GPU never waits for the host, so there is nothing to switch on; leave it out",
    "differentiable": "its step cannot be differentiated; for gradients with respect to std use GaussianKL",
    "weight_decay": "weights are held by the posterior and, with prior= and kl_weight=, by the KL; leave it out or 0",
    "momentum": "the posterior's precision takes its place; leave it out or 0",
}
"""Options of other optimizers, and what BGD has instead."""


class BGD(torch.optim.Optimizer):
    """Bayesian Gradient Descent: each parameter is a Gaussian; the model trains on its samples.

    In ``train()`` mode the parameters hold a sample: ``loss.backward(); opt.step()`` does one fused step and
    draws the next sample. ``eval()`` puts the means in. ``step(closure)`` works in either mode.

    Args:
        params: parameters, groups or named parameters (``model.named_parameters()``; names are needed for
            ``prior``, for a posterior as ``std_init``, and for `posterior`).
        lr: step size of the mean, float or scalar tensor, >= 0 (BGD's eta; 1 is the natural step). A CUDA graph of the
            step reads a tensor on the device at each replay and keeps a float; so with ``kl_weight``.
        std_init: standard deviation that every parameter starts from, or a `Posterior` to start from.
        data_per_step: how many data points one step's *mean* loss stands for. BGD wants the gradient of a sum,
            so the gradient is multiplied by it; over a run, 1/std**2 gathers the curvature of
            steps * data_per_step data points. The original takes the batch size.
        mc_samples: Monte Carlo samples per update (K): so many calls of ``step()``, or one of
            ``step(closure)``. More than one keeps two more buffers per parameter.
        antithetic: draw eps and -eps in turn, which cancels noise in the statistics of an even K.
        prior: the frozen posterior of preparation. With it the objective is
            (1 - kl_weight) * data_per_step * loss + kl_weight * KL(q || prior). A prior that is compressed or on
            another device (`Posterior.compress`, `Posterior.to`) stays so, and each step restores it piece by piece.
        kl_weight: lambda in [0, 1], float or scalar tensor; used with ``prior`` only.
        max_mean_step: trust region, largest |change of mean| per step in units of std (infinity: off).
        max_log_std_step: trust region, largest |change of log std| per step (infinity: off).
        max_std: cap on std; ``None`` is the (largest) initial one, infinity is off. The published rule is
            ``max_mean_step=max_log_std_step=max_std=math.inf``; alone it tends to diverge.
        learn_mean, learn_std: whether to update them.
        stochastic_rounding: round samples stochastically into bfloat16 parameters.
        maximize: ascend the loss.
        seed: 64-bit key of the generator; draws depend on (seed, parameter's position, draw number) alone, so all
            ranks of a distributed run hold the same sample, whole or in shards (`torch.distributed.tensor.DTensor`).
        sample_group: process group (``torch.distributed.group.WORLD``, say) whose ranks each draw ``mc_samples``
            samples of their own: an update averages the statistics of size * ``mc_samples`` samples and of the
            ranks' batches. The model's gradients must not be averaged over these ranks by anything else.
        backend: see `distruction.ops`.
        release_gradients: take each parameter's gradient inside ``backward`` as soon as it is complete, and drop it:
            the same bits without the gradients' memory. Each backward pass is then one Monte Carlo sample, followed
            by one ``step()``; gradient accumulation, clipping, GradScaler and several ranks, which need the gradients
            of the whole model, do not go with it. Where ``backward`` raises, part of the model is updated: load a
            state_dict.

    Raises:
        UsageError: an option is out of range, or names are needed and missing.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = BGD(model.parameters(), std_init=0.05, data_per_step=8)
    >>> opt.train()
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     loss = model(torch.ones(8, 2)).square().mean()
    ...     loss.backward()
    ...     _ = opt.step()
    >>> opt.eval()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        std_init: float | Posterior = 0.05,
        data_per_step: float = 1.0,
        mc_samples: int = 1,
        antithetic: bool = True,
        prior: Posterior | None = None,
        kl_weight: float | Tensor = 0.0,
        max_mean_step: float = 0.1,
        max_log_std_step: float = 0.1,
        max_std: float | None = None,
        learn_mean: bool = True,
        learn_std: bool = True,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        seed: int = 0,
        sample_group: Any = None,
        backend: str = "auto",
        release_gradients: bool = False,
        **unknown: Any,
    ) -> None:
        for name, value in unknown.items():
            if name in _REFUSED and not value:
                continue  # a factory that gives every optimizer the same options, such as timm's
            raise UsageError(f"BGD has no option {name!r}: {_REFUSED.get(name, 'see help(BGD) for those it has')}")
        if isinstance(std_init, Posterior):
            cap = std_init.largest_std()
        elif 0 < std_init < math.inf:
            cap = float(std_init)
        else:
            raise UsageError(f"std_init must be > 0 and finite, not {std_init}; 0.05 suits weights of order 0.1")
        if release_gradients and distributed.size() > 1:
            raise UsageError(
                "release_gradients would take the gradients before the ranks have averaged them; with several ranks "
                "use release_gradients=False (fully_shard divides the gradients' memory by the number of ranks)"
            )
        self._initial = std_init
        self._prior = prior
        self._release_gradients = release_gradients
        self._sample_group = sample_group
        self._training = False
        # What a step changes besides tensors; a dict because torch.compile (2.8) cannot set an optimizer's attribute.
        self._now: dict[str, Any] = {"gradients_at_sample": False, "kl": []}
        self._counters: list[Tensor | None] = []
        self._leads: dict[int, int] = {}
        self._scalars: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._streams = 0
        self._position: dict[Tensor, int] = {}
        # By group: the parameters whose gradients were released since the last step, and before it; the counters after
        # each, and its KL.
        self._taken: list[list[tuple[Tensor, Tensor, Tensor | None]]] = []
        self._released: list[list[tuple[Tensor, Tensor, Tensor | None]]] = []
        defaults = {
            "lr": lr,
            "data_per_step": data_per_step,
            "mc_samples": mc_samples,
            "antithetic": antithetic,
            "kl_weight": kl_weight,
            "max_mean_step": max_mean_step,
            "max_log_std_step": max_log_std_step,
            "max_std": cap if max_std is None else max_std,
            "learn_mean": learn_mean,
            "learn_std": learn_std,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "seed": seed,
            "backend": backend,
            "draw": 0,
            "accumulated": 0,
            "calls": 0,
            "training": False,
        }
        super().__init__(params, defaults)
        # GradScaler then leaves unscaling and skipping to the fused step, without a host sync.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get the next generator streams."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except UsageError:
            self.param_groups.pop()
            raise
        group.setdefault("first_stream", self._streams)
        self._streams = group["first_stream"] + len(group["params"])
        group["training"] = self._training
        self._counters.append(None)
        self._taken.append([])
        self._released.append([])
        self._position |= {p: i for i, p in enumerate(group["params"])}
        if self._release_gradients:
            self._release_from(len(self.param_groups) - 1)
        if self._training:
            self._draw(group, group["params"])

    def _check_group(self, group: dict[str, Any]) -> None:
        for name, instead in _REFUSED.items():
            if group.get(name):
                raise UsageError(f"BGD has no option {name!r}: {instead}")
        for name in _POSITIVE:
            if not group[name] > 0:
                raise UsageError(f"{name} must be > 0, not {group[name]}")
        if math.isinf(group["data_per_step"]):
            raise UsageError("data_per_step must be finite; give the number of data points a step stands for")
        if not isinstance(group["mc_samples"], int) or group["mc_samples"] < 1:
            raise UsageError(f"mc_samples must be an integer >= 1, not {group['mc_samples']!r}")
        for name in ("lr", "kl_weight"):
            if isinstance(group[name], Tensor) and group[name].numel() != 1:
                raise UsageError(f"Tensor {name} must be 1-element, not of shape {tuple(group[name].shape)}")
        if not isinstance(group["lr"], Tensor) and not 0 <= group["lr"] < math.inf:
            raise UsageError(f"lr must be >= 0 and finite, not {group['lr']}")
        if not isinstance(group["kl_weight"], Tensor) and not 0 <= group["kl_weight"] <= 1:
            raise UsageError(f"kl_weight (lambda) must be in [0, 1], not {group['kl_weight']}")
        names = group.get("param_names")
        for source, what in ((self._initial, "a posterior as std_init"), (self._prior, "prior")):
            if isinstance(source, Posterior):
                if names is None:
                    raise UsageError(f"{what} goes by parameter names: pass model.named_parameters() to BGD")
                for name, p in zip(names, group["params"], strict=True):
                    if p.requires_grad and source.shapes.get(name) != p.shape:
                        raise UsageError(
                            f"{what} has no parameter {name} of shape {tuple(p.shape)}; is it of this model?"
                        )
        for i, p in enumerate(group["params"]):
            if p.is_complex():
                raise UsageError(f"parameter {names[i] if names else i} is complex; BGD is defined for real weights")
            if self._sample_group is not None and is_sharded(p):
                sampling = set(dist.get_process_group_ranks(self._sample_group))
                if len(shared := sampling.intersection(p.device_mesh.mesh.flatten().tolist())) > 1:
                    raise UsageError(
                        f"parameter {names[i] if names else i} is spread over ranks {sorted(shared)} of sample_group, "
                        "so that they must hold one sample; leave sample_group out, or name a group across the shards"
                    )

    # --- modes -----------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self) -> None:
        """Let the parameters hold the current sample."""
        for group in self.param_groups:
            group["training"] = True
            self._draw(group, [p for p in group["params"] if p.requires_grad])
        self._training = True

    @torch.no_grad()
    def eval(self, *, check: bool = True) -> None:
        """Let the parameters hold the means.

        Args:
            check: call `raise_if_nonfinite`, which waits for the device and may wait for other ranks.

        Raises:
            NonFiniteError: an update since the last check was not finite (the means are in place all the same).
        """
        for group in self.param_groups:
            group["training"] = False
            for p in group["params"]:
                if p in self.state:
                    local(p).copy_(local(self.state[p]["mean"]))
        self._training = False
        if check:
            self.raise_if_nonfinite()

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """The parameters hold the current sample inside, and what they held before outside, whatever happens inside.

        Gradients taken inside may be given to `step` afterwards.
        """
        was_training = self._training
        self.train()
        try:
            yield
        except BaseException:
            # Other ranks may not be here, so nothing that waits for them.
            if not was_training:
                self.eval(check=False)
            raise
        self._now["gradients_at_sample"] = True
        if not was_training:
            self.eval()

    # --- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One Monte Carlo sample's worth of BGD; the update comes with the last of ``mc_samples``.

        Args:
            closure: clears the gradients, computes the loss at the current parameters, calls ``backward`` and
                returns the loss. With it, all ``mc_samples`` samples are drawn and the update is made in this call.

        Returns:
            The closure's last loss, or ``None``.

        Raises:
            UsageError: the parameters hold the means, so that there is no gradient at a sample; or a gradient is
                sparse.
            NonFiniteError: on the CPU, an element's update was not finite (it kept its mean and std). On other
                devices and under ``torch.compile``, `eval`, `state_dict` and `raise_if_nonfinite` find out, so that
                a step never waits.
        """
        if closure is None:
            if not (self._training or self._now["gradients_at_sample"]):
                if not self.state and all(group["lr"] == 0 for group in self.param_groups):
                    # torch.distributed.checkpoint asks in this way for a state to load into.
                    self._fill_state()
                    return None
                raise UsageError(
                    "the parameters hold the means, so their gradients say nothing about std: call opt.train() before "
                    "the forward pass (and opt.eval() before evaluation), or pass a closure to step"
                )
            self._consume()
            if not self._training:
                self.eval()
            return None
        loss = None
        was_training = self._training
        with torch.no_grad():
            self.train()
            try:
                for _ in range(max(group["mc_samples"] - group["calls"] for group in self.param_groups)):
                    with torch.enable_grad():
                        loss = closure()
                    self._consume()
            except BaseException:
                if not was_training:
                    self.eval(check=False)
                raise
            if not was_training:
                self.eval()
        return loss

    def _consume(self) -> None:
        """Take the gradients of the current sample: into the statistics or, with the last sample, into an update."""
        self._check_gradients()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if self._release_gradients and (grad_scale is not None or found_inf is not None):
            raise UsageError(
                "a GradScaler needs the gradients of the whole model before the update, which release_gradients has "
                "made by then; use bfloat16, or release_gradients=False"
            )
        self._now["gradients_at_sample"] = False
        elsewhere: set[int] = set()
        if self._sample_group is not None:
            overflow, elsewhere = self._agree(found_inf)
            if overflow:
                return
        kls = []
        for index, group in enumerate(self.param_groups):
            last = _is_last(group)
            group["calls"] = 0 if last else group["calls"] + 1
            several = self._has_statistics(group)
            released, self._taken[index] = self._taken[index], []
            self._released[index] = released
            done = {id(p) for p, _, _ in released}
            active = [
                p
                for p in group["params"]
                if id(p) not in done
                and (p.grad is not None or id(p) in elsewhere or (several and "m1" in self.state.get(p, {})))
            ]
            if not active and not released:
                continue
            counters = self._counters_of(index, (active or [released[0][0]])[0].device)
            lists = [piece for params in _by_layout(active) for piece in self._pieces(params, last)]
            ends = [end for _, end, _ in released]
            found = [(kl, p) for p, _, kl in released]
            for params in lists:
                # One draw number serves the group: each list starts from it.
                end = counters if len(lists) == 1 and not released else _fork(counters)
                found.append((self._take(index, params, end, last, grad_scale, found_inf), params[0]))
                ends.append(end)
            if ends[0] is not counters:
                _join(counters, ends)
            if last and self._prior is not None:
                kls += found
            # Parameters without a gradient take part in the next draw, so that one draw number serves the group.
            done |= {id(p) for p in active}
            self._draw(group, [p for p in group["params"] if p in self.state and id(p) not in done])
        if kls:
            self._now["kl"] = kls
        on_cpu = all(c is None or c.device.type == "cpu" for c in self._counters)
        if on_cpu and not torch.compiler.is_compiling():
            self.raise_if_nonfinite()

    def _take(
        self,
        index: int,
        params: list[Tensor],
        counters: Tensor,
        last: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Accumulate the gradients of ``params`` or, with the last sample, update; returns the KL of what is here."""
        group, device = self.param_groups[index], counters.device
        state = [self._state(index, p) for p in params]
        pieces = Pieces(params, self._streams_of(group, params))
        held, buffers = zip(*(_held_and_out(p) for p in params), strict=True)
        outs, grads = pieces.of(buffers), pieces.of([_gradient(p) for p in params])
        mean, std = pieces.of([s["mean"] for s in state]), pieces.of([s["std"] for s in state])
        m1: list[Tensor] = []
        m2: list[Tensor] = []
        if self._has_statistics(group):
            for s in state:
                _add_statistics(s)
            m1, m2 = pieces.of([s["m1"] for s in state]), pieces.of([s["m2"] for s in state])
        generator = (
            pieces.offsets,
            pieces.streams,
            group["seed"],
            counters,
            group["antithetic"],
            group["stochastic_rounding"],
        )
        amp = [None if t is None else t.to(device) for t in (grad_scale, found_inf)]
        kl = None
        if not last or self._sample_group is not None:
            ops.accumulate(outs, m1, m2, grads, mean, std, *generator, *amp, group["backend"])
            if not outs:
                _advance(counters, False, amp[1])
        if last:
            if self._sample_group is not None:
                # All samples are in the statistics now; the step takes one more gradient, so it gets a zero.
                all_reduce_([*m1, *m2], self._sample_group)
                ranks = dist.get_world_size(self._sample_group)
                counters[0] += (ranks - 1) * group["mc_samples"] - 1
                counters[1] = counters[1] * ranks - 1
                grads, amp = [torch.zeros_like(g) for g in grads], [None, None]
            names = self._names_of(group, params) if self._prior is not None else []
            prior = [self._prior.fetch(name, device) for name in names] if self._prior is not None else []
            kl = ops.step(
                outs,
                mean,
                std,
                grads,
                m1,
                m2,
                pieces.of([m for m, _ in prior]) if prior else [],
                pieces.of([s for _, s in prior]) if prior else [],
                self._scalar(index, "lr", device),
                self._scalar(index, "kl_weight", device),
                -group["data_per_step"] if group["maximize"] else group["data_per_step"],
                *generator,
                group["max_mean_step"],
                group["max_log_std_step"],
                group["max_std"],
                group["learn_mean"],
                group["learn_std"],
                *amp,
                group["backend"],
            )
            if not outs:
                _advance(counters, True, amp[1])
        _copy_back(buffers, held)
        return kl

    def _pieces(self, params: list[Tensor], last: bool) -> list[list[Tensor]]:
        """The parameters to take in one op: all of them, unless the prior has to be restored or fetched."""
        if not last or self._prior is None or self._prior.at_hand(params[0].device):
            return [params]
        pieces: list[list[Tensor]] = [[]]
        room = STREAMED_ELEMENTS
        for p in params:
            if pieces[-1] and p.numel() > room:
                pieces.append([])
                room = STREAMED_ELEMENTS
            pieces[-1].append(p)
            room -= p.numel()
        return pieces

    def _release_from(self, index: int) -> None:
        """Let ``backward`` take and drop the gradients of a group, as long as this optimizer lives."""
        optimizer = weakref.ref(self)

        def release(p: Tensor) -> None:
            alive = optimizer()
            if alive is not None and alive._training:
                alive._release(index, p)

        handles = [
            p.register_post_accumulate_grad_hook(release) for p in self.param_groups[index]["params"] if p.requires_grad
        ]
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    @torch.no_grad()
    def _release(self, index: int, p: Tensor) -> None:
        if any(p is q for q, _, _ in self._taken[index]):
            raise UsageError(
                "a second backward pass reached a parameter before step(): with release_gradients each backward pass "
                "is one Monte Carlo sample, so call step() after each; to accumulate gradients use "
                "release_gradients=False"
            )
        if p.grad is not None and p.grad.is_sparse:
            self._check_gradients()
        counters = _fork(self._counters_of(index, p.device))
        kl = self._take(index, [p], counters, _is_last(self.param_groups[index]))
        p.grad = None
        self._taken[index].append((p, counters, kl))

    def _agree(self, found_inf: Tensor | None) -> tuple[bool, set[int]]:
        """Whether a gradient overflowed on any rank of ``sample_group``, and what has a gradient on any of them."""
        params = [p for group in self.param_groups for p in group["params"]]
        flags = torch.tensor([False, *(p.grad is not None for p in params)], dtype=torch.int32, device=params[0].device)
        if found_inf is not None:
            flags[0] = found_inf.to(flags.device).reshape(()) != 0
        overflow, *present = largest(flags, [self._sample_group]).tolist()
        return bool(overflow), {id(p) for p, there in zip(params, present, strict=True) if there}

    @property
    def kl(self) -> Tensor | None:
        """KL(q || prior) after the last update, a float64 scalar tensor; ``None`` before or without a prior.

        Of sharded parameters it is summed when it is asked for, by all ranks together.
        """
        kls: list[tuple[Tensor, Tensor]] = self._now["kl"]
        if not kls:
            return None
        parts = [sum_over_shards(kl, of) for kl, of in kls]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def raise_if_nonfinite(self) -> None:
        """Raise if an update since the last call was refused because it was not finite; waits for the device.

        Where parameters are sharded or ``sample_group`` is given, all ranks call it and all raise.

        Raises:
            NonFiniteError: says after which update, and names the parameters whose gradient is not finite now.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [*groups_of(params), *([] if self._sample_group is None else [self._sample_group])]
        flags = [c is not None and c[2].item() for c in self._counters]
        if groups:
            device = local(params[0]).device
            flags = largest(torch.tensor(flags, dtype=torch.int32, device=device), groups).tolist()
        flagged = [i for i, flag in enumerate(flags) if flag]
        if not flagged:
            return
        labels, bad = [], []
        for i in flagged:
            if (counters := self._counters[i]) is not None:
                counters[2] = 0
            labels += self._labels(self.param_groups[i])
            refused = [p for p, end, _ in self._released[i] if end[2].item()]
            bad += [
                (p.grad is not None and not local(p.grad).isfinite().all()) or any(p is q for q in refused)
                for p in self.param_groups[i]["params"]
            ]
        if groups:
            bad = largest(torch.tensor(bad, dtype=torch.int32, device=device), groups).tolist()
        names = [label for label, is_bad in zip(labels, bad, strict=True) if is_bad]
        where = f"the gradient of {', '.join(names[:5])}" if names else "an update"
        raise NonFiniteError(
            f"{where} is NaN or infinite (found after update {self._updates(flagged[0])}); the elements concerned "
            "kept their mean and std. Lower lr or std_init, or look for the cause in the loss"
        )

    def _updates(self, index: int) -> int:
        """Updates made so far, told by the draws that they used."""
        samples = self.param_groups[index]["mc_samples"]
        if self._sample_group is not None:
            samples *= dist.get_world_size(self._sample_group)
        counters = self._counters[index]
        return 0 if counters is None else (int(counters[0]) - self._leads[index]) // samples

    # --- state -----------------------------------------------------------------------------------

    def posterior(self, *, copy: bool = True) -> Posterior:
        """The current means and stds by parameter name, sharded where the parameters are.

        Args:
            copy: ``False`` shares the optimizer's memory, for a caller that takes no further step.

        Raises:
            UsageError: the optimizer was made without parameter names.
        """
        means, stds = {}, {}
        for index, group in enumerate(self.param_groups):
            if "param_names" not in group:
                raise UsageError("a posterior goes by parameter names: pass model.named_parameters() to BGD")
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.requires_grad:
                    state = self._state(index, p)
                    means[name], stds[name] = (state[k].clone() if copy else state[k] for k in ("mean", "std"))
        return Posterior(means, stds)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs: means, stds, statistics, draw numbers and options.

        The prior is not in it: pass the same one when the optimizer is made again.
        """
        if self._sample_group is not None and any(group["calls"] for group in self.param_groups):
            raise UsageError(
                "between the samples of one update each rank holds statistics of its own (sample_group): take the "
                "state_dict after the update"
            )
        self._sync_counters()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict`; the parameters then hold what they held when it was made (sample or means).

        Options that the state lacks, because it is of an older version, stay as they are.

        Raises:
            UsageError: the state is not of a BGD, or of other parameters; nothing has changed.
        """
        final: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            final.update(self._checked(given))
            return final

        def take_over(_: torch.optim.Optimizer) -> None:
            # torch casts state to the parameter's dtype; ours is float32 whatever the parameter is.
            for p, state in self._saved_states(final):
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
            self.register_load_state_dict_post_hook(take_over, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _saved_states(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The parameters and what ``state_dict`` holds of each; as many as there are of both."""
        params = (p for group in self.param_groups for p in group["params"])
        indices = (i for group in state_dict["param_groups"] for i in group["params"])
        for p, index in zip(params, indices, strict=False):
            yield p, state_dict["state"].get(index, {})

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with every option, if it can be this optimizer's; else an error before anything has changed."""
        if any(name not in group for group in state_dict["param_groups"] for name in _PROGRESS):
            raise UsageError(
                f"the state_dict is not of a BGD, whose groups have {', '.join(_PROGRESS)}; load one that "
                "BGD.state_dict() has made"
            )
        if [len(g["params"]) for g in self.param_groups] != [len(g["params"]) for g in state_dict["param_groups"]]:
            return state_dict  # torch says so
        labels = [label for group in self.param_groups for label in self._labels(group)]
        for label, (p, state) in zip(labels, self._saved_states(state_dict), strict=True):
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
        options = ({k: group[k] for k in self.defaults if k in group} for group in self.param_groups)
        groups = [own | saved for own, saved in zip(options, state_dict["param_groups"], strict=True)]
        for group in groups:
            held = [state_dict["state"].get(i, {}) for i in group["params"]]
            if group["accumulated"] and not any("m1" in state for state in held):
                raise UsageError(
                    f"the state was saved after {group['accumulated']} of {group['mc_samples']} samples of an update, "
                    "but their statistics are not in it; load it before the optimizer's first train()"
                )
        return {**state_dict, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        if self._sample_group is not None:
            raise UsageError("an optimizer with sample_group cannot be copied or pickled; copy its state_dict")
        self._sync_counters()
        keys = ("_initial", "_prior", "_training", "_now", "_streams", "_release_gradients")
        return {**super().__getstate__(), **{k: getattr(self, k) for k in keys}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        self._reset()
        # torch also calls this from load_state_dict, where the group stays and the hooks are there.
        if "_initial" in state:
            self._sample_group = None
            if self._release_gradients:
                for index in range(len(self.param_groups)):
                    self._release_from(index)

    def _reset(self) -> None:
        """Forget what was derived from the groups and the state."""
        self._leads = {}
        self._counters = [None] * len(self.param_groups)
        self._scalars = {}
        self._position = {p: i for group in self.param_groups for i, p in enumerate(group["params"])}
        self._taken = [[] for _ in self.param_groups]
        self._released = [[] for _ in self.param_groups]

    def _sync_counters(self) -> None:
        if any(self._taken):
            raise UsageError("backward has updated a part of the model (release_gradients): call step() first")
        self.raise_if_nonfinite()
        for index, counters in enumerate(self._counters):
            if counters is not None:
                group = self.param_groups[index]
                draw, group["accumulated"], _ = counters.tolist()
                group["draw"] = draw - self._leads[index]

    def _counters_of(self, index: int, device: torch.device) -> Tensor:
        counters = self._counters[index]
        if counters is None:
            group = self.param_groups[index]
            self._leads[index] = self._lead(group)
            counters = torch.tensor([group["draw"] + self._leads[index], group["accumulated"], 0], device=device)
            self._counters[index] = counters
        return counters

    def _lead(self, group: dict[str, Any]) -> int:
        """How many samples of an update are drawn by the ranks before this one."""
        return 0 if self._sample_group is None else dist.get_rank(self._sample_group) * group["mc_samples"]

    def _has_statistics(self, group: dict[str, Any]) -> bool:
        return group["mc_samples"] > 1 or self._sample_group is not None

    def _fill_state(self) -> None:
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    state = self._state(index, p)
                    if self._has_statistics(group):
                        _add_statistics(state)

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

    def _state(self, index: int, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            group = self.param_groups[index]
            if isinstance(self._initial, Posterior):
                mean, std = self._initial.fetch(self._names_of(group, [p])[0], p.device)
                state["mean"], state["std"] = shard_like(mean, p).clone(), shard_like(std, p).clone()
            else:
                state["mean"] = torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(p)
                state["std"] = torch.full_like(state["mean"], self._initial)
        return state

    def _draw(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Write the group's current sample into ``params``."""
        if not params:
            return
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        state = [self._state(index, p) for p in params]
        pieces = Pieces(params, self._streams_of(group, params))
        held, outs = zip(*(_held_and_out(p) for p in params), strict=True)
        ops.sample(
            pieces.of(outs),
            pieces.of([s["mean"] for s in state]),
            pieces.of([s["std"] for s in state]),
            pieces.offsets,
            pieces.streams,
            group["seed"],
            self._counters_of(index, params[0].device),
            group["antithetic"],
            group["stochastic_rounding"],
            group["backend"],
        )
        _copy_back(outs, held)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for name, p in zip(self._labels(group), group["params"], strict=True):
                if p.grad is not None and p.grad.is_sparse:
                    raise UsageError(f"the gradient of {name} is sparse; BGD needs dense gradients (sparse=False)")

    def _streams_of(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[int]:
        return [group["first_stream"] + self._position[p] for p in params]

    def _names_of(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[str]:
        return [group["param_names"][self._position[p]] for p in params]

    @staticmethod
    def _labels(group: dict[str, Any]) -> list[str]:
        return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]


def _is_last(group: dict[str, Any]) -> bool:
    """Whether the current sample completes the group's update."""
    return bool(group["calls"] + 1 >= group["mc_samples"])


def _fork(counters: Tensor) -> Tensor:
    """Counters for a part of a group, which starts from the same draw."""
    own = counters.clone()
    own[2] = 0
    return own


def _join(counters: Tensor, ends: Sequence[Tensor]) -> None:
    """Advance a group's counters to where its parts ended: they agree but for the flag of a refused update."""
    flag = counters[2].clone()
    counters.copy_(torch.stack(list(ends)).amax(0))
    counters[2] |= flag


def _by_layout(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters in lists that are spread over ranks in one way, so that a sum over each list has one meaning."""
    lists: dict[Any, list[Tensor]] = {}
    for p in params:
        lists.setdefault(layout(p), []).append(p)
    return list(lists.values())


def _held_and_out(p: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank holds of ``p``, and where an op may write it: the same, or a contiguous buffer."""
    held = local(p)
    if held.is_contiguous():
        return held, held
    return held, torch.empty_like(held, memory_format=torch.contiguous_format)


def _copy_back(outs: Sequence[Tensor], held: Sequence[Tensor]) -> None:
    for out, t in zip(outs, held, strict=True):
        if out is not t:
            t.copy_(out)


def _gradient(p: Tensor) -> Tensor:
    """What this rank holds of the gradient, contiguous and without history; zero where there is none."""
    if p.grad is None:
        return torch.zeros_like(local(p), memory_format=torch.contiguous_format)
    grad: Any = p.grad.detach()
    if is_sharded(p) and layout(grad) != layout(p):
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return local(grad).contiguous()


def _add_statistics(state: dict[str, Tensor]) -> None:
    for name in ("m1", "m2"):
        if name not in state:
            state[name] = torch.zeros_like(state["mean"])


def _advance(counters: Tensor, last: bool, found_inf: Tensor | None) -> None:
    """What an op does to ``counters``, for a rank whose shards are all empty."""
    taken = 1 if found_inf is None else (found_inf.reshape(()) == 0).long()
    counters[0] += taken
    counters[1] = counters[1] * (1 - taken) if last else counters[1] + taken
