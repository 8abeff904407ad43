"""The tensors of a whole model, and the ops of this library over them, as they are timed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distruction import BGD, Posterior, ops

from . import harness
from .harness import Contestant

LR, KL_WEIGHT, SCALE, EVIDENCE = 1e-4, 0.1, 1.0, 64.0


class Workload:
    """The tensors of one model: a sample in ``param`` and its gradient, the posterior, its prior, the statistics."""

    def __init__(self, shapes: Sequence[torch.Size], device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(mean: float, std: float) -> list[Tensor]:
            return [torch.empty(s, device=device).normal_(mean, std, generator=generator) for s in shapes]

        self.device = device
        self.param = normal(0.0, 0.02)
        self.grad = normal(0.0, 1e-3)
        self.prior_mean = normal(0.0, 0.02)
        self.prior_std = [s.abs_().add_(0.005) for s in normal(0.0, 0.01)]
        self.mean = [m.clone() for m in self.prior_mean]
        self.std = [s.clone() for s in self.prior_std]
        self.m1 = [torch.zeros_like(m) for m in self.mean]
        self.m2 = [torch.zeros_like(m) for m in self.mean]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(m.numel() for m in self.mean)


def parameters_of(w: Workload) -> list[nn.Parameter]:
    """An optimizer's own parameters, since what another one wrote would become its means; the gradients are shared."""
    params = [nn.Parameter(p.clone()) for p in w.param]
    for p, g in zip(params, w.grad, strict=True):
        p.grad = g
    return params


def _state(w: Workload, *names: str) -> ops.State:
    return ops.State(w.mean, w.std, **{name: getattr(w, name) for name in names})


def _draws(w: Workload, antithetic: bool) -> ops.Draws:
    n = len(w.mean)
    return ops.Draws([0] * n, range(n), 1, torch.zeros(3, dtype=torch.int64, device=w.device), antithetic)


def rule_on(device: torch.device) -> ops.Rule:
    """BGD's rule with its default bounds."""
    scalars = (torch.tensor(LR, device=device), torch.tensor(KL_WEIGHT, device=device))
    return ops.Rule(*scalars, SCALE, max_mean_step=0.1, max_log_std_step=0.1, max_std=0.1)


def _pairs(make: Callable[[bool], Contestant]) -> dict[str, Contestant]:
    """With independent draws, and with antithetic pairs (BGD's default), whose second half needs no new normals."""
    return {"": make(False), ", antithetic pairs": harness.Repeated(make(True), 2)}


def our_sample(w: Workload, backend: str) -> dict[str, Contestant]:
    state, draws = _state(w), _draws(w, antithetic=False)
    return {"": lambda: ops.sample(w.param, state, draws, backend=backend)}


def our_accumulate(w: Workload, backend: str) -> dict[str, Contestant]:
    def make(antithetic: bool) -> Contestant:
        state, draws = _state(w, "m1", "m2"), _draws(w, antithetic)
        return lambda: ops.accumulate(w.param, w.grad, state, draws, backend=backend)

    return _pairs(make)


def our_step(w: Workload, backend: str, with_prior: bool) -> dict[str, Contestant]:
    state, rule = _state(w, *(("prior_mean", "prior_std") if with_prior else ())), rule_on(w.device)

    def make(antithetic: bool) -> Contestant:
        draws = _draws(w, antithetic)
        return lambda: ops.step(w.param, w.grad, state, draws, rule, backend=backend)

    return _pairs(make)


def our_gauss_newton(w: Workload, backend: str) -> dict[str, Contestant]:
    # No old draw is regenerated, so that antithetic pairs would cost the same.
    state, draws = _state(w), _draws(w, antithetic=False)
    return {"": lambda: ops.gauss_newton(w.param, w.grad, state, draws, EVIDENCE, backend=backend)}


def our_kl(w: Workload, backend: str) -> dict[str, Contestant]:
    return {"": lambda: ops.gaussian_kl(w.mean, w.std, w.prior_mean, w.prior_std, backend=backend)}


def our_optimizer(w: Workload, backend: str) -> dict[str, Contestant]:
    names = [str(i) for i in range(len(w.mean))]
    prior = Posterior(dict(zip(names, w.prior_mean, strict=True)), dict(zip(names, w.prior_std, strict=True)))

    def make(antithetic: bool) -> Contestant:
        named = zip(names, parameters_of(w), strict=True)
        opt = BGD(
            named, lr=LR, std_init=prior, prior=prior, kl_weight=KL_WEIGHT, antithetic=antithetic, backend=backend
        )
        opt.train()
        return opt.step

    return _pairs(make)
