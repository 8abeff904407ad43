"""Bayesian Gradient Descent as a ``torch.optim`` optimizer.

Zeno, Golan, Hoffer, Soudry, "Task Agnostic Continual Learning Using Online Variational Bayes", arXiv
1803.10123; with ``prior`` and ``kl_weight`` it minimises DiStruction's forgetting objective. The formulas are
in `distruction.ops.reference.step`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import distributed, ops
from ..errors import NonFiniteError, UsageError
from ..posterior import Posterior
from ..sharding import Pieces, groups_of, largest, local, shard_like, sum_over_shards
from . import options
from .counters import Counters, fork, join
from .options import labels_of
from .release import Released, check_first, release_from
from .state import Held, checked, saved_states, take_over
from .update import Members, add_statistics, by_layout, streamed


class BGD(torch.optim.Optimizer):
    """Bayesian Gradient Descent: each parameter is a Gaussian; the model trains on its samples.

    In ``train()`` mode the parameters hold a sample: ``loss.backward(); opt.step()`` does one fused step and
    draws the next sample. ``eval()`` puts the means in. ``step(closure)`` works in either mode.

    What somebody else writes to a parameter, such as ``model.load_state_dict``, becomes its mean, elementwise and
    with the std that it had. Frozen parameters (``requires_grad=False``) are not written; one that is frozen while it
    holds a sample keeps it until `eval` puts its mean in. One that is unfrozen takes part from the next update's
    first sample on: a gradient that was taken at its mean is not used.

    Args:
        params: parameters, groups or named parameters (``model.named_parameters()``; names are needed for
            ``prior``, for a posterior as ``std_init``, and for `posterior`). A group may have each option of its own
            but ``prior``, ``sample_group``, ``release_gradients`` and ``statistic``, and lies on one device.
        lr: step size of the mean, float or scalar tensor, >= 0 (BGD's eta; 1 is the natural step). A CUDA graph of the
            step reads a tensor on the device at each replay and keeps a float; so with ``kl_weight``.
        std_init: standard deviation that every parameter starts from, or a `Posterior` to start from.
        statistic: ``"bgd"``, or ``"gauss-newton"``: 1/std**2 += data_per_step * g**2 at the sample, exactly and
            elementwise (`distruction.ops.gauss_newton`). The loss is then the signed one,
            sum_n s_n loss_n / sqrt(batch) with s_n = +-1 and targets drawn from the model's own prediction, so that
            E[g**2] is the diagonal of the mean example's Gauss-Newton matrix; of several ranks' average it is the sum
            over all their examples. It needs ``learn_mean=False`` and ``mc_samples=1``, and no prior; lr, trust
            region and cap do not matter to it.
        data_per_step: how many data points one step's *mean* loss stands for. BGD wants the gradient of a sum,
            so the gradient is multiplied by it; over a run, 1/std**2 gathers the curvature of
            steps * data_per_step data points. The original takes the batch size.
        mc_samples: Monte Carlo samples per update (K): so many calls of ``step()``, or one of
            ``step(closure)``. More than one keeps two more buffers per parameter.
        antithetic: draw eps and -eps in turn, which cancels noise in the statistics of an even K.
        prior: the frozen posterior of preparation. With it the objective is
            (1 - kl_weight) * data_per_step * loss + kl_weight * KL(q || prior). A prior that is compressed or on
            another device (`Posterior.compress`, `Posterior.to`) stays so, and each step restores it piece by piece.
        kl_weight: lambda in [0, 1], float or scalar tensor; goes with ``prior``, and ``prior`` with it (0 where a
            schedule is to raise it).
        max_mean_step: trust region, largest |change of mean| per step in units of std (infinity: off).
        max_log_std_step: trust region, largest |change of log std| per step (infinity: off).
        max_std: cap on std; ``None`` is the (largest) initial one, infinity is off. The published rule is
            ``max_mean_step=max_log_std_step=max_std=math.inf``; alone it tends to diverge.
        learn_mean, learn_std: whether to update them.
        stochastic_rounding: round samples stochastically into bfloat16 parameters.
        maximize: ascend the loss.
        seed: 64-bit key of the generator; draws depend on (seed, parameter's position, draw number) alone, so all
            ranks of a distributed run hold the same sample, whole or in shards (`torch.distributed.tensor.DTensor`).
            Two optimizers of one seed so draw the same eps, also for different models: names would not tell these
            apart, and nothing else is the same on all ranks and in a resumed run. Give each its own seed, or its
            groups a ``first_stream`` beyond the other's parameters.
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
        statistic: str = "bgd",
        data_per_step: float = 1.0,
        mc_samples: int = 1,
        antithetic: bool = True,
        prior: Posterior | None = None,
        kl_weight: float | Tensor | None = None,
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
        options.check_names(unknown)
        defaults = {
            "lr": lr,
            "statistic": statistic,
            "data_per_step": data_per_step,
            "mc_samples": mc_samples,
            "antithetic": antithetic,
            "kl_weight": kl_weight,
            "max_mean_step": max_mean_step,
            "max_log_std_step": max_log_std_step,
            "max_std": max_std,
            "learn_mean": learn_mean,
            "learn_std": learn_std,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "seed": seed,
            "backend": backend,
        }
        common = {"std_init": std_init, "prior": prior, "release_gradients": release_gradients}
        options.check_values({k: v for k, v in {**defaults, **common}.items() if v is not None})
        if max_std is None:
            defaults["max_std"] = _largest(std_init)
        if kl_weight is None and prior is None:
            defaults["kl_weight"] = 0.0
        if release_gradients and distributed.size() > 1:
            raise UsageError(
                "release_gradients would take the gradients before the ranks have averaged them; with several ranks "
                "use release_gradients=False (fully_shard divides the gradients' memory by the number of ranks)"
            )
        self._std_init = std_init
        self._prior = prior
        self._release_gradients = release_gradients
        self._sample_group = sample_group
        self._training = False
        # What a step changes besides tensors; a dict because torch.compile (2.8) cannot set an optimizer's attribute.
        # "kl": by group, the KL's parts at its last update and the positions that they are of; "looks": uses of samples
        # for prediction since the last step.
        self._now: dict[str, Any] = {"gradients_at_sample": False, "kl": {}, "looks": 0}
        self._streams = 0
        # By group.
        self._initial: list[float | Posterior] = []
        self._counters: list[Counters] = []
        self._held: list[Held] = []
        self._released: list[Released] = []
        self._scalars: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._position: dict[Tensor, int] = {}
        super().__init__(params, {**defaults, "draw": 0, "accumulated": 0, "calls": 0, "training": False})
        # GradScaler then leaves unscaling and skipping to the fused step, without a host sync.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get the next generator streams.

        Raises:
            UsageError: an option is unknown, out of range or not a group's own; or an update is under way.
        """
        if self._counters and (phase := max(c.phase() for c in self._counters)):
            raise UsageError(
                f"{phase} of {self.param_groups[0]['mc_samples']} samples of an update are taken, and a group takes "
                "part in all of them: add it after the step that completes the update"
            )
        initial = param_group.get("std_init", self._std_init)
        common = {k: self.defaults[k] for k in ("statistic",)}
        common |= {"release_gradients": self._release_gradients, "sample_group": self._sample_group}
        options.check_own(param_group, common)
        options.check_values({k: v for k, v in param_group.items() if v is not None or k != "max_std"})
        group = {k: v for k, v in param_group.items() if k not in ("std_init", "release_gradients", "sample_group")}
        if group.get("max_std") is None and "std_init" in param_group:
            group["max_std"] = _largest(initial)
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            group["kl_weight"] = options.check_weight(group["kl_weight"], self._prior)
            given = {**group, "prior": self._prior, "sample_group": self._sample_group}
            options.check_statistic(group["statistic"], given)
            sources = {"a posterior as std_init": initial, "prior": self._prior}
            options.check_parameters(group, sources, self._sample_group)
        except UsageError:
            self.param_groups.pop()
            raise
        group.setdefault("first_stream", self._streams)
        self._streams = group["first_stream"] + len(group["params"])
        group["training"] = self._training
        self._initial.append(initial)
        self._append(group)
        index = len(self.param_groups) - 1
        if self._release_gradients:
            release_from(self, index)
        if self._training:
            self._draw(index)

    # --- modes -----------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self) -> None:
        """Let the parameters hold the current sample."""
        self._take_over()
        for index in range(len(self.param_groups)):
            self._draw(index)
        self._set_training(True)

    @torch.no_grad()
    def eval(self, *, check: bool = True) -> None:
        """Let the parameters hold the means.

        Args:
            check: call `raise_if_nonfinite`, which waits for the device and may wait for other ranks.

        Raises:
            NonFiniteError: an update since the last check was not finite (the means are in place all the same); or
                NaN was written to a parameter (it is as it was).
        """
        self._take_over(strict=check)
        for group, held in zip(self.param_groups, self._held, strict=True):
            for p in group["params"]:
                if p in self.state:
                    local(p).copy_(local(self.state[p]["mean"]))
            held.sampled = False
            held.note(group["params"])
        self._set_training(False)
        if check:
            self.raise_if_nonfinite()

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """The parameters hold a sample inside, and what they held before outside, whatever happens inside.

        Gradients taken inside may be given to `step` afterwards, which draws the next sample. Without gradients it is
        for prediction: each use gives another sample of the posterior, and training goes on as if it had not been.
        Gradients taken after a prediction, before a step, are at a sample of yet another key of the generator, which
        `step` goes on with; in the middle of an update that sample is no antithetic partner. All ranks of a
        distributed run use it equally often.
        """
        was_training = self._training
        self._take_over()
        looks = 0 if self._now["gradients_at_sample"] else self._now["looks"]
        seeds = [group["seed"] for group in self.param_groups]
        for index, group in enumerate(self.param_groups):
            group["seed"] = _another(seeds[index], looks)
            self._draw(index)
        self._set_training(True)
        mark = object()
        before = self._mark_gradients(mark)
        learns = False
        try:
            yield
            learns = self._gradients_since(mark, before)
        finally:
            if not learns:
                self._take_over(strict=False)
                for group, seed in zip(self.param_groups, seeds, strict=True):
                    group["seed"] = seed
            if not was_training:
                # Where an exception leaves, other ranks may not be here, so nothing that waits for them.
                self.eval(check=False)
            elif not learns:
                self.train()
        self._now["gradients_at_sample"] = learns
        self._now["looks"] = 0 if learns else looks + 1
        if not was_training:
            self.raise_if_nonfinite()

    # --- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One Monte Carlo sample's worth of BGD; the update comes with the last of ``mc_samples``.

        A call in which no parameter has a gradient is no sample and changes nothing; nor does one whose gradients a
        GradScaler found to overflow. In every other call a parameter without a gradient has a zero one.

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
                for _ in range(max(c.group["mc_samples"] - c.phase() for c in self._counters)):
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; those taken in `sampled_params` are gone with them."""
        super().zero_grad(set_to_none)
        self._now["gradients_at_sample"] = False

    def _consume(self) -> None:
        """Take the gradients of the current sample: into the statistics or, with the last sample, into an update."""
        for group in self.param_groups:
            self._check_gradients(group)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if self._release_gradients and (grad_scale is not None or found_inf is not None):
            raise UsageError(
                "a GradScaler needs the gradients of the whole model before the update, which release_gradients has "
                "made by then; use bfloat16, or release_gradients=False"
            )
        self._now["gradients_at_sample"] = False
        self._now["looks"] = 0
        elsewhere: set[int] = set()
        if self._sample_group is not None:
            overflow, elsewhere = self._agree(found_inf)
            if overflow:
                return
            found_inf = None
        elif found_inf is not None and found_inf.device.type == "cpu" and not torch.compiler.is_compiling():
            if found_inf.item() != 0:
                return
            found_inf = None
        if not (
            elsewhere
            or any(p.grad is not None for group in self.param_groups for p in group["params"])
            or any(released.pending for released in self._released)
        ):
            return
        self._take_over()
        for index in range(len(self.param_groups)):
            self._consume_group(index, grad_scale, found_inf, elsewhere)
        on_cpu = all(c.tensor is None or c.tensor.device.type == "cpu" for c in self._counters)
        if on_cpu and not torch.compiler.is_compiling():
            self.raise_if_nonfinite()

    def _consume_group(
        self, index: int, grad_scale: Tensor | None, found_inf: Tensor | None, elsewhere: set[int]
    ) -> None:
        """Take a group's gradients."""
        group, counters, held = self.param_groups[index], self._counters[index], self._held[index]
        params: list[Tensor] = group["params"]
        tensor = counters.on(params[0].device)
        found_inf = None if found_inf is None else found_inf.to(tensor.device)
        learnable = _learnable(params)
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
                or id(params[i]) in elsewhere
                or (several and "m1" in self.state[params[i]])
            )
        ]
        lists = by_layout([params[i] for i in active])
        if pulls and not self._prior.at_hand(tensor.device):  # type: ignore[union-attr]
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

        if drawn != learnable:
            # Who was unfrozen waits for an update's first sample.
            drawn = learnable if counters.phase() == 0 else taking
        done.update(active)
        if len(done) < len(drawn):
            # Parameters without a gradient take part in the next draw, so that one draw number serves the group.
            self._members(index, [params[i] for i in drawn if i not in done]).sample(tensor)
        held.drawn, held.sampled = drawn, True
        held.note(params)

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
            members.gauss_newton(counters, grad_scale, found_inf)
            return None
        skips = (found_inf, found_inf) if splits is None else splits
        if splits is not None or not completes or self._sample_group is not None:
            members.accumulate(counters, grad_scale, skips[0])
        if splits is None and not completes:
            return None
        names = [] if self._prior is None else [group["param_names"][self._position[p]] for p in params]
        scalars = self._scalar(index, "lr", device), self._scalar(index, "kl_weight", device)
        return members.step(counters, scalars, self._prior, names, grad_scale, skips[1], self._sample_group)

    @torch.no_grad()
    def _release(self, index: int, p: Tensor) -> None:
        """Take a gradient that backward has completed."""
        held, released, counters = self._held[index], self._released[index], self._counters[index]
        position = self._position[p]
        check_first(released, p)
        self._check_gradients(self.param_groups[index])
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

    @property
    def kl(self) -> Tensor | None:
        """KL(q || prior) after the last update, a float64 scalar tensor; ``None`` before or without a prior.

        It is that of all parameters of `posterior`, summed by the updates; if some were frozen or unfrozen since, it
        is computed anew. Of sharded parameters it is summed when it is asked for, by all ranks together.
        """
        if not self._now["kl"]:
            return None
        parts: list[tuple[Tensor, Tensor]] = []
        for index, group in enumerate(self.param_groups):
            found, positions = self._now["kl"].get(index, ([], None))
            now = _learnable(group["params"])
            parts += found if positions == now else [self._kl_of(index, group["params"][i]) for i in now]
        sums = [sum_over_shards(kl, of) for kl, of in parts]
        return torch.stack([part.to(sums[0].device) for part in sums]).sum()

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

    # --- state -----------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior(self, *, copy: bool = True) -> Posterior:
        """The current means and stds by parameter name, sharded where the parameters are.

        Args:
            copy: ``False`` shares the optimizer's memory, for a caller that takes no further step.

        Raises:
            UsageError: the optimizer was made without parameter names.
        """
        if any("param_names" not in group for group in self.param_groups):
            raise UsageError("a posterior goes by parameter names: pass model.named_parameters() to BGD")
        self._take_over()
        means, stds = {}, {}
        for index, p in self._learnable():
            name = self.param_groups[index]["param_names"][self._position[p]]
            state = self._state(index, p)
            means[name], stds[name] = (state[k].clone() if copy else state[k] for k in ("mean", "std"))
        self._note_first()
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
            final.update(checked(self.param_groups, list(self.defaults), self.defaults["statistic"], given))
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

    def _reset(self) -> None:
        """Forget what was derived from the groups and the state."""
        self._counters, self._held, self._released = [], [], []
        self._scalars, self._position = {}, {}
        for group in self.param_groups:
            self._append(group)

    def _append(self, group: dict[str, Any]) -> None:
        own = self._sample_group
        rank, size = (0, 1) if own is None else (dist.get_rank(own), dist.get_world_size(own))
        self._counters.append(Counters(group, lead=rank, samplers=size))
        self._held.append(Held())
        self._released.append(Released())
        self._position |= {p: i for i, p in enumerate(group["params"])}

    def _synchronize(self) -> None:
        """Bring the groups and the state up to date with the device and with what was written."""
        if any(released.pending for released in self._released):
            raise UsageError("backward has updated a part of the model (release_gradients): call step() first")
        self._take_over()
        self.raise_if_nonfinite()

    @torch.no_grad()
    def _take_over(self, *, strict: bool = True) -> None:
        """Let the means be what was written to the parameters since the optimizer wrote them last."""
        for index, (group, held) in enumerate(zip(self.param_groups, self._held, strict=False)):
            written = held.written(group["params"])
            for i in written:
                p = group["params"][i]
                if p not in self.state:
                    continue
                mean = local(self.state[p]["mean"])
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

    def _set_training(self, training: bool) -> None:
        self._training = training
        for group in self.param_groups:
            group["training"] = training

    @torch.no_grad()
    def _draw(self, index: int) -> None:
        """Write a group's current sample into its parameters."""
        group, held, counters = self.param_groups[index], self._held[index], self._counters[index]
        params, drawn = group["params"], held.drawn
        if drawn != (learnable := _learnable(params)):
            first = drawn is None or counters.phase() == 0
            drawn = learnable if first else [i for i in drawn or () if params[i].requires_grad]
        if drawn:
            options.check_devices(group, self.state)
            self._members(index, [params[i] for i in drawn]).sample(counters.on(params[0].device))
        held.drawn, held.sampled = drawn, True
        held.note(params)

    def _members(self, index: int, params: list[Tensor]) -> Members:
        group = self.param_groups[index]
        streams = [group["first_stream"] + self._position[p] for p in params]
        return Members(group, params, [self._state(index, p) for p in params], streams)

    def _state(self, index: int, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            group, initial = self.param_groups[index], self._initial[index]
            if isinstance(initial, Posterior):
                mean, std = initial.fetch(group["param_names"][self._position[p]], p.device)
                state["mean"], state["std"] = shard_like(mean, p).clone(), shard_like(std, p).clone()
            else:
                state["mean"] = torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(p)
                state["std"] = torch.full_like(state["mean"], initial)
        return state

    def _fill_state(self) -> None:
        for index, p in self._learnable():
            state = self._state(index, p)
            if self._has_statistics(self.param_groups[index]):
                add_statistics(state)
        self._note_first()

    def _learnable(self) -> Iterator[tuple[int, Tensor]]:
        """The parameters of the posterior, each with its group's index."""
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    yield index, p

    def _has_statistics(self, group: dict[str, Any]) -> bool:
        return group["mc_samples"] > 1 or self._sample_group is not None

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

    @staticmethod
    def _check_gradients(group: dict[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.grad.is_sparse:
                raise UsageError(
                    f"the gradient of {labels_of(group)[i]} is sparse; BGD needs dense gradients (sparse=False)"
                )

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


def _learnable(params: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters that are not frozen."""
    return [i for i, p in enumerate(params) if p.requires_grad]


def _largest(std_init: float | Posterior) -> float:
    return std_init.largest_std() if isinstance(std_init, Posterior) else float(std_init)


def _another(seed: int, number: int) -> int:
    """The ``number``-th key after ``seed``, of 64 bits with a sign; the 0th is the seed itself."""
    return (seed + number * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
