"""What is timed: the ops of this library and their peers, on the tensors of a whole model, for CPU and GPU alike.

The peers do the same work by other means. `Op.make` gives an op's contestants: ours, one per backend, and the
peers, of which "eager" is the baseline; `training_steps` gives whole training steps. An op's contestants share the
tensors of one `Workload`, whose values stay harmless (small steps, no subnormal numbers), since time does not depend
on them.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from distruction import BGD, ops
from distruction.ops import reference

from . import harness
from .harness import Contestant
from .our_ops import (
    EVIDENCE,
    KL_WEIGHT,
    LR,
    SCALE,
    Workload,
    our_accumulate,
    our_gauss_newton,
    our_kl,
    our_optimizer,
    our_sample,
    our_step,
    parameters_of,
    rule_on,
)

BASELINE = "eager"
ADAMW = "AdamW fused"

MODELS = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
}
"""Name to timm's name of the models whose parameter lists are used."""


def parameter_shapes(model: str) -> list[torch.Size]:
    """The shapes of the parameters of one of `MODELS`, without making its weights."""
    with torch.device("meta"):
        return [p.shape for p in timm.create_model(MODELS[model], num_classes=1000).parameters()]


# --- Bayesian Gradient Descent as published, written plainly, per tensor ----------------------------


def eager_draw(param: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Write mean + std * eps into ``param``; returns eps."""
    eps = torch.randn_like(mean)
    param.copy_(mean + std * eps)
    return eps


def eager_update(mean: Tensor, std: Tensor, s1: Tensor, s2: Tensor) -> None:
    """mean <- mean - lr * std**2 * s1 and std <- std * sqrt(1 + a**2) - std * a, a = std * s2 / 2."""
    mean -= LR * std**2 * s1
    a = 0.5 * std * s2
    std.copy_(std * torch.sqrt(1.0 + a**2) - std * a)


def eager_kl(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(N(mean, std**2) || N(prior_mean, prior_std**2)) and its gradients."""
    difference = mean - prior_mean
    kl = torch.log(prior_std / std) + (std**2 + difference**2) / (2.0 * prior_std**2) - 0.5
    return kl.sum(dtype=torch.float64), difference / prior_std**2, std / prior_std**2 - 1.0 / std


def eager_step(
    param: Tensor, mean: Tensor, std: Tensor, grad: Tensor, eps: Tensor, prior_mean: Tensor, prior_std: Tensor
) -> tuple[Tensor, Tensor]:
    """One update with one Monte Carlo sample and the KL; returns the KL and the next eps."""
    kl, kl_mean, kl_std = eager_kl(mean, std, prior_mean, prior_std)
    data = (1.0 - KL_WEIGHT) * SCALE * grad
    eager_update(mean, std, data + KL_WEIGHT * kl_mean, data * eps + KL_WEIGHT * kl_std)
    return kl, eager_draw(param, mean, std)


def eager_sample(w: Workload) -> Contestant:
    def run() -> None:
        for p, m, s in zip(w.param, w.mean, w.std, strict=True):
            eager_draw(p, m, s)

    return run


def one_call_sample(w: Workload) -> Contestant:
    def run() -> None:
        for p, m, s in zip(w.param, w.mean, w.std, strict=True):
            torch.normal(m, s, out=p)

    return run


def eager_accumulate(w: Workload) -> Contestant:
    eps = [torch.randn_like(m) for m in w.mean]

    def run() -> None:
        for i, (p, a1, a2, g, m, s) in enumerate(zip(w.param, w.m1, w.m2, w.grad, w.mean, w.std, strict=True)):
            a1 += g
            a2 += g * eps[i]
            eps[i] = eager_draw(p, m, s)

    return run


def eager_step_without_prior(w: Workload) -> Contestant:
    eps = [torch.randn_like(m) for m in w.mean]

    def run() -> None:
        for i, (p, m, s, g) in enumerate(zip(w.param, w.mean, w.std, w.grad, strict=True)):
            data = SCALE * g
            eager_update(m, s, data, data * eps[i])
            eps[i] = eager_draw(p, m, s)

    return run


def eager_steps(w: Workload, step: Callable[..., tuple[Tensor, Tensor]] = eager_step) -> Contestant:
    eps = [torch.randn_like(m) for m in w.mean]
    lists = (w.param, w.mean, w.std, w.grad, eps, w.prior_mean, w.prior_std)

    def run() -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=w.device)
        for i, tensors in enumerate(zip(*lists, strict=True)):
            kl, eps[i] = step(*tensors)
            total += kl
        return total

    return run


def eager_gauss_newton(w: Workload) -> Contestant:
    def run() -> None:
        for p, m, s, g in zip(w.param, w.mean, w.std, w.grad, strict=True):
            s /= torch.sqrt(1.0 + EVIDENCE * (g * s) ** 2)
            eager_draw(p, m, s)

    return run


def eager_gaussian_kl(w: Workload) -> Contestant:
    def run() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        terms = [eager_kl(*t) for t in zip(w.mean, w.std, w.prior_mean, w.prior_std, strict=True)]
        return torch.stack([t[0] for t in terms]).sum(), [t[1] for t in terms], [t[2] for t in terms]

    return run


# --- the same with multi-tensor operators, in place over scratch that is allocated once --------------


class Scratch:
    """One flat array and its views in the shapes of a list of tensors, for operators that span the model."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.flat = torch.empty(sum(t.numel() for t in like), device=like[0].device)
        views = self.flat.split([t.numel() for t in like])
        self.views = [v.view(t.shape) for v, t in zip(views, like, strict=True)]

    def set(self, values: list[Tensor]) -> list[Tensor]:
        """Copy ``values`` into the views; returns the views."""
        torch._foreach_copy_(self.views, values)
        return self.views


def _foreach_draw(param: list[Tensor], mean: list[Tensor], std: list[Tensor], eps: Scratch) -> None:
    eps.flat.normal_()
    torch._foreach_copy_(param, mean)
    torch._foreach_addcmul_(param, std, eps.views)


def _foreach_update(
    mean: list[Tensor], std: list[Tensor], s1: list[Tensor], s2: list[Tensor], scratch: Scratch
) -> None:
    """`eager_update`; overwrites ``s1`` and ``s2``."""
    torch._foreach_mul_(s1, std)
    torch._foreach_addcmul_(mean, s1, std, value=-LR)
    torch._foreach_mul_(s2, std)
    torch._foreach_mul_(s2, 0.5)
    root = scratch.set(s2)
    torch._foreach_mul_(root, s2)
    torch._foreach_add_(root, 1.0)
    torch._foreach_sqrt_(root)
    torch._foreach_sub_(root, s2)
    torch._foreach_mul_(std, root)


def foreach_sample(w: Workload) -> Contestant:
    eps = Scratch(w.mean)
    return lambda: _foreach_draw(w.param, w.mean, w.std, eps)


def foreach_accumulate(w: Workload) -> Contestant:
    eps = Scratch(w.mean)
    eps.flat.normal_()

    def run() -> None:
        torch._foreach_add_(w.m1, w.grad)
        torch._foreach_addcmul_(w.m2, w.grad, eps.views)
        _foreach_draw(w.param, w.mean, w.std, eps)

    return run


def foreach_step_without_prior(w: Workload) -> Contestant:
    eps, a, b, c = (Scratch(w.mean) for _ in range(4))
    eps.flat.normal_()

    def run() -> None:
        s1 = a.set(w.grad)
        torch._foreach_mul_(s1, SCALE)
        s2 = b.set(s1)
        torch._foreach_mul_(s2, eps.views)
        _foreach_update(w.mean, w.std, s1, s2, c)
        _foreach_draw(w.param, w.mean, w.std, eps)

    return run


def foreach_step(w: Workload) -> Contestant:
    eps, a, b, c, d = (Scratch(w.mean) for _ in range(5))
    eps.flat.normal_()

    def run() -> Tensor:
        s1 = a.set(w.grad)
        torch._foreach_mul_(s1, (1.0 - KL_WEIGHT) * SCALE)
        s2 = b.set(s1)
        torch._foreach_mul_(s2, eps.views)
        # The mean's part of the KL, and its gradient.
        difference = c.set(w.mean)
        torch._foreach_sub_(difference, w.prior_mean)
        torch._foreach_div_(difference, w.prior_std)
        total = c.flat.dot(c.flat)
        torch._foreach_div_(difference, w.prior_std)
        torch._foreach_add_(s1, difference, alpha=KL_WEIGHT)
        # The std's part.
        ratio = c.set(w.std)
        torch._foreach_div_(ratio, w.prior_std)
        total += c.flat.dot(c.flat)
        inverse = d.set(w.std)
        torch._foreach_reciprocal_(inverse)
        torch._foreach_add_(s2, inverse, alpha=-KL_WEIGHT)
        torch._foreach_addcdiv_(s2, ratio, w.prior_std, value=KL_WEIGHT)
        torch._foreach_log_(ratio)
        total -= 2.0 * c.flat.sum()
        _foreach_update(w.mean, w.std, s1, s2, c)
        _foreach_draw(w.param, w.mean, w.std, eps)
        return 0.5 * (total - c.flat.numel())

    return run


def foreach_gauss_newton(w: Workload) -> Contestant:
    eps, t = Scratch(w.mean), Scratch(w.mean)

    def run() -> None:
        root = t.set(w.grad)
        torch._foreach_mul_(root, w.std)
        torch._foreach_mul_(root, root)
        torch._foreach_mul_(root, EVIDENCE)
        torch._foreach_add_(root, 1.0)
        torch._foreach_sqrt_(root)
        torch._foreach_div_(w.std, root)
        _foreach_draw(w.param, w.mean, w.std, eps)

    return run


# --- compiled --------------------------------------------------------------------------------------


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    # Of one dimension, so that one graph of dynamic size serves all; a view would be guarded by its base's strides.
    return [t.new_empty(0).set_(t.untyped_storage(), 0, (t.numel(),), (1,)) for t in tensors]


def compiled_eager(w: Workload) -> Contestant:
    """`eager_step`, fused by the compiler, one call per tensor."""
    torch.compiler.reset()  # another number of threads is another graph
    step = torch.compile(eager_step, dynamic=True)
    return eager_steps(w, lambda *tensors: step(*_flat(tensors)))


def compiled_reference(w: Workload) -> Contestant:
    """The reference implementation of the whole contract, fused by the compiler, one call per tensor.

    (A graph of ViT-B's whole list was not compiled within 9 minutes.)
    """
    rule = rule_on(w.device)

    @torch.compile(dynamic=True)
    def step(p: Tensor, m: Tensor, s: Tensor, g: Tensor, pm: Tensor, ps: Tensor, counters: Tensor) -> Tensor:
        state = ops.State([m], [s], prior_mean=[pm], prior_std=[ps])
        return reference.step([p], [g], state, ops.Draws([0], [0], 1, counters, antithetic=True), rule, ops.Amp())

    counters = [torch.zeros(3, dtype=torch.int64, device=w.device) for _ in w.mean]
    lists = [_flat(tensors) for tensors in (w.param, w.mean, w.std, w.grad, w.prior_mean, w.prior_std)]

    def run() -> Tensor:
        return torch.stack([step(*tensors) for tensors in zip(*lists, counters, strict=True)]).sum()

    return run


# --- other optimizers --------------------------------------------------------------------------------


def adamw(w: Workload) -> Contestant:
    """AdamW, fused: no distribution over the weights, 28 bytes per parameter."""
    return torch.optim.AdamW(parameters_of(w), lr=LR, fused=True).step


def ivon(w: Workload) -> Contestant:
    """IVON (Shen et al. 2024), the package ``ivon-opt``: one Monte Carlo sample and an update."""
    from ivon import IVON

    opt = IVON(parameters_of(w), lr=LR, ess=1e6)

    def run() -> None:
        with opt.sampled_params(train=True):
            pass  # the gradient is there
        opt.step()

    return run


# --- whole training steps ----------------------------------------------------------------------------


def training_steps(
    create: Callable[[], nn.Module], images: Tensor, targets: Tensor, backends: Sequence[str]
) -> dict[str, Callable[[], Contestant]]:
    """Makers of one training step each, by name: forward and backward pass in bfloat16 autocast, then the optimizer's.

    With K samples per update a step of preparation is one sample's passes; its time is the mean over the K steps.

    Args:
        create: makes the model, on the device of ``images``.
        images: a batch.
        targets: its labels.
        backends: of BGD.
    """

    def steps(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Contestant:
        model = create()
        optimizer = make(model)

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()

        # Several in a row, so that the host runs ahead of the device as it does in training.
        return harness.Repeated(run, 8)

    def preparation(backend: str, mc_samples: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            opt = BGD(
                model.named_parameters(), data_per_step=float(len(images)), mc_samples=mc_samples, backend=backend
            )
            opt.train()
            return opt

        return make

    return {
        ADAMW: lambda: steps(lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True)),
        **{
            f"distruction ({b}), preparation, K = {k}": lambda b=b, k=k: steps(preparation(b, k))  # type: ignore[misc]
            for b in backends
            for k in (1, 2)
        },
    }


# --- the table ---------------------------------------------------------------------------------------

Factory = Callable[[Workload], Contestant]


@dataclass(frozen=True)
class Op:
    """An op to time.

    Attributes:
        arrays: float32 arrays of the parameters' size that it has to read or write once each.
        ours: from the workload and a backend; name's suffix to contestant.
        peers: name to their factory; "eager" is the baseline.
    """

    arrays: int
    ours: Callable[[Workload, str], dict[str, Contestant]]
    peers: dict[str, Factory]

    def makers(self, backends: Sequence[str]) -> dict[str, Callable[[Workload], dict[str, Contestant]]]:
        """What makes the contestants, by name: from the workload, name's suffix to contestant."""

        def of_backend(backend: str) -> Callable[[Workload], dict[str, Contestant]]:
            return lambda w: self.ours(w, backend)

        def of_peer(factory: Factory) -> Callable[[Workload], dict[str, Contestant]]:
            return lambda w: {"": factory(w)}

        return {
            **{f"distruction ({b})": of_backend(b) for b in backends},
            **{name: of_peer(factory) for name, factory in self.peers.items()},
        }

    def make(self, w: Workload, backends: Sequence[str]) -> dict[str, Contestant]:
        """The contestants by name; a peer whose package is not installed is left out."""
        made: dict[str, Contestant] = {}
        for name, maker in self.makers(backends).items():
            with contextlib.suppress(ImportError):
                made |= {name + suffix: run for suffix, run in maker(w).items()}
        return made


OPS = {
    "sample": Op(
        3,
        our_sample,
        {BASELINE: eager_sample, "torch.normal(mean, std)": one_call_sample, "foreach": foreach_sample},
    ),
    "accumulate": Op(8, our_accumulate, {BASELINE: eager_accumulate, "foreach": foreach_accumulate}),
    "step without prior": Op(
        6,
        lambda w, backend: our_step(w, backend, with_prior=False),
        {BASELINE: eager_step_without_prior, "foreach": foreach_step_without_prior},
    ),
    "step with prior": Op(
        8,
        lambda w, backend: our_step(w, backend, with_prior=True),
        {BASELINE: eager_steps, "foreach": foreach_step},
    ),
    "gauss_newton": Op(5, our_gauss_newton, {BASELINE: eager_gauss_newton, "foreach": foreach_gauss_newton}),
    "gaussian_kl": Op(6, our_kl, {BASELINE: eager_gaussian_kl}),
    "optimizer step": Op(
        8,
        our_optimizer,
        {
            BASELINE: eager_steps,
            "foreach": foreach_step,
            "torch.compile (eager)": compiled_eager,
            "torch.compile (reference)": compiled_reference,
            ADAMW: adamw,
            "IVON": ivon,
        },
    ),
}
"""Op name to what is timed; "optimizer step" is the whole `BGD.step` with a prior, against whole optimizers."""
