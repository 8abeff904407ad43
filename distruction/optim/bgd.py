"""Bayesian Gradient Descent as a ``torch.optim`` optimizer.

Zeno, Golan, Hoffer, Soudry, "Task Agnostic Continual Learning Using Online Variational Bayes", arXiv
1803.10123; with ``prior`` and ``kl_weight`` it minimises DiStruction's forgetting objective. The formulas are
in `distruction.ops.reference.step`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..errors import UsageError
from ..posterior import Posterior
from ..sharding import local, sum_over_shards
from . import options
from .groups import learnable_positions
from .release import release_from
from .saved import Saved


class BGD(Saved):
    """Bayesian Gradient Descent: each parameter is a Gaussian; the model trains on its samples.

    In ``train()`` mode the parameters hold a sample: ``loss.backward(); opt.step()`` does one fused step and
    draws the next sample. ``eval()`` puts the means in. ``step(closure)`` works in either mode.

    What somebody else writes to a parameter, such as ``model.load_state_dict``, becomes its mean, elementwise, with
    the std that it had (what is written in place through ``p.data`` in `eval` mode alone; a sample changed so, and a
    second one that mirrors it, is gone with the update). Frozen parameters are not written; one that is frozen while it
    holds a sample keeps it until `eval` puts its mean in. One that is unfrozen takes part from the next update's first
    sample on: a gradient that was taken at its mean is not used.

    Args:
        params: parameters, groups or named parameters (``model.named_parameters()``; names are needed for
            ``prior``, for a posterior or a mapping as ``std_init``, and for `posterior`). A group may have each option
            of its own but ``prior``, ``sample_group``, ``release_gradients``, ``statistic`` and ``at_means``; it is on
            one device.
        lr: step size of the mean, float or scalar tensor, >= 0 (BGD's eta; 1 is the natural step). A CUDA graph of the
            step reads a tensor on the device at each replay and keeps a float; so with ``kl_weight``.
        std_init: standard deviation that every parameter starts from; one for each parameter by name; or a `Posterior`
            to start from.
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
            another device (`Posterior.compress`, `Posterior.to`) stays so; each step reads its codes as they are, and
            moves or restores anything else piece by piece.
        kl_weight: lambda in [0, 1], float or scalar tensor; goes with ``prior``, and ``prior`` with it (0 where a
            schedule is to raise it).
        max_mean_step: trust region, largest |change of mean| per step in units of std (infinity: off).
        max_log_std_step: trust region, largest |change of log std| per step (infinity: off).
        max_std: cap on std; ``None`` is the (largest) initial one, infinity is off. The published rule is
            ``max_mean_step=max_log_std_step=max_std=math.inf``; alone it tends to diverge.
        learn_mean, learn_std: whether to update them.
        at_means: take the gradients at the means: the parameters hold them in ``train()`` mode as well, and nothing is
            sampled. The stds scale the steps and are kept, so that it needs ``learn_std=False``.
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
        std_init: float | dict[str, float] | Posterior = 0.05,
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
        at_means: bool = False,
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
            "at_means": at_means,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "seed": seed,
            "backend": backend,
        }
        common = {"std_init": std_init, "prior": prior, "release_gradients": release_gradients}
        may_lack = ("max_std", "prior", "kl_weight")
        options.check_values({k: v for k, v in {**defaults, **common}.items() if v is not None or k not in may_lack})
        defaults = options.plain(defaults)
        if max_std is None:
            defaults["max_std"] = options.largest_std(std_init)
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
        self._now = {"gradients_at_sample": False, "kl": {}, "looks": 0}
        self._streams = 0
        self._initial = []
        self._counters = []
        self._held = []
        self._watched = []
        self._released = []
        self._scalars = {}
        self._position = {}
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
        common = {k: self.defaults[k] for k in ("statistic", "at_means")}
        common |= {"release_gradients": self._release_gradients, "sample_group": self._sample_group}
        options.check_own(param_group, common)
        options.check_values({k: v for k, v in param_group.items() if v is not None or k != "max_std"})
        group = {k: v for k, v in param_group.items() if k not in ("std_init", "release_gradients", "sample_group")}
        if group.get("max_std") is None and "std_init" in param_group:
            group["max_std"] = options.largest_std(initial)
        super().add_param_group(options.plain(group))
        group = self.param_groups[-1]
        try:
            group["kl_weight"] = options.check_weight(group["kl_weight"], self._prior)
            given = {**group, "prior": self._prior, "sample_group": self._sample_group}
            options.check_kind(given)
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
        self._check_groups()
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
        if check:
            self._check_groups()
        self._take_over(strict=check)
        for group, held in zip(self.param_groups, self._held, strict=True):
            for p in group["params"]:
                if p in self.state:
                    local(p).copy_(local(self.state[p]["mean"]))
            held.wrote(group["params"], None)
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
        self._check_groups()
        self._take_over()
        looks = 0 if self._now["gradients_at_sample"] else self._now["looks"]
        seeds = [group["seed"] for group in self.param_groups]
        separated: list[Tensor] = []
        for index, group in enumerate(self.param_groups):
            if looks:
                separated += self._separate_pair(index, seeds[index])
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
                self._drop_sums(separated)
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
            now = learnable_positions(group["params"])
            parts += found if positions == now else [self._kl_of(index, group["params"][i]) for i in now]
        sums = [sum_over_shards(kl, of) for kl, of in parts]
        return torch.stack([part.to(sums[0].device) for part in sums]).sum()

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


def _another(seed: int, number: int) -> int:
    """The ``number``-th key after ``seed``, of 64 bits with a sign; the 0th is the seed itself."""
    return (seed + number * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
