"""Tensors and options to run the ops on, and the calls, by a backend or by the reference."""

import math
from dataclasses import dataclass, field, fields

import torch

from distruction import ops
from distruction.ops import Amp, Draws, Rule, State, reference
from distruction.ops.reference.philox import words_and_normals

SIZES = (1, 3, 64, 0, 1000, 5001)
OFFSETS = (0, 7, 2**34 - 8, 3, 512, 8191)
STREAMS = (0, 2**32 - 1, 5, 6, 7, 8)
SEED = -77


@dataclass
class Model:
    """Lists of tensors by name and where they lie: offsets and streams."""

    tensors: dict[str, list[torch.Tensor]]
    offsets: tuple[int, ...]
    streams: tuple[int, ...]

    def __getitem__(self, name):
        return self.tensors[name]

    def to(self, device="cpu", dtype=None, misaligned=False):
        """A copy; ``dtype`` is the state's and the parameters'; misaligned tensors start an element too late."""
        tensors = {
            name: [copy_of(t, device, None if name == "grad" else dtype, misaligned) for t in ts]
            for name, ts in self.tensors.items()
        }
        return Model(tensors, self.offsets, self.streams)


def copy_of(t, device, dtype, misaligned):
    t = t.detach().to(device, dtype, copy=True)
    return torch.cat([t[:1], t])[-len(t) :] if misaligned and len(t) else t


def make_model(device, sizes=SIZES, *, param=torch.float32, grad=torch.float32, **where):
    """A posterior near its prior."""
    generator = torch.Generator().manual_seed(0)

    def draw(function):
        return [function(torch.randn(n, generator=generator)).to(device) for n in sizes]

    prior_std = draw(lambda x: 0.05 * torch.exp(0.5 * x))
    tensors = {
        "param": draw(lambda x: x.to(param)),
        "grad": draw(lambda x: x.to(grad)),
        "mean": draw(lambda x: x),
        "std": draw(lambda x: 0.05 * torch.exp(0.5 * x)),
        "m1": draw(lambda x: x),
        "m2": draw(lambda x: x),
        "prior_mean": draw(lambda x: x),
        "prior_std": prior_std,
    }
    return Model(tensors, **({"offsets": OFFSETS[: len(sizes)], "streams": STREAMS[: len(sizes)]} | where))


@dataclass(frozen=True)
class Options:
    """The arguments of an update beside the tensors."""

    lr: float = 0.3
    kl_weight: float = 0.1
    loss_scale: float = 50.0
    prior: bool = True
    statistics: bool = False
    pair: bool = False
    antithetic: bool = False
    stochastic_rounding: bool = False
    max_mean_step: float = 0.1
    max_log_std_step: float = 0.1
    max_std: float = 0.1
    learn_mean: bool = True
    learn_std: bool = True
    evidence: float = 300.0
    grad_scale: float | None = None
    found_inf: float | None = None
    counters: tuple[int, ...] = field(default=(5, 0, 0))


def optional(value, device):
    return None if value is None else torch.tensor(value, device=device)


def state_of(model, *names):
    """The model's mean and std, and of its other arrays those named."""
    return State(**{name: model[name] for name in ("mean", "std", *names)})


def draws_of(model, counters, antithetic=False, stochastic_rounding=False):
    counters = torch.tensor(counters, device=model["mean"][0].device)
    return Draws(model.offsets, model.streams, SEED, counters, antithetic, stochastic_rounding)


def amp_of(model, o):
    device = model["mean"][0].device
    return Amp(optional(o.grad_scale, device), optional(o.found_inf, device))


def rule_of(model, o):
    """The options that are the rule's, whose names are its fields'."""
    values = {f.name: getattr(o, f.name) for f in fields(Rule)}
    scalars = {name: torch.tensor(values[name], device=model["mean"][0].device) for name in ("lr", "kl_weight")}
    return Rule(**{**values, **scalars})


def step(model, o, backend=None):
    """One step, by the reference if there is no backend; returns the counters and the KL."""
    statistics = ("m1", "m2") if o.statistics else ("m1",) if o.pair else ()
    state = state_of(model, *statistics, *(("prior_mean", "prior_std") if o.prior else ()))
    draws = draws_of(model, o.counters, o.antithetic, o.stochastic_rounding)
    call = (model["param"], model["grad"], state, draws, rule_of(model, o), amp_of(model, o))
    kl = reference.step(*call) if backend is None else ops.step(*call, backend=backend.name)
    return draws.counters.tolist(), kl.item()


def accumulate(model, o, backend=None):
    """One accumulation, by the reference if there is no backend; returns the counters."""
    state = state_of(model, "m1", *([] if o.pair else ["m2"]))
    draws = draws_of(model, o.counters, o.antithetic, o.stochastic_rounding)
    call = (model["param"], model["grad"], state, draws, amp_of(model, o))
    reference.accumulate(*call) if backend is None else ops.accumulate(*call, backend=backend.name)
    return draws.counters.tolist()


def gauss_newton(model, o, backend=None):
    """One Gauss-Newton update, by the reference if there is no backend; returns the counters."""
    draws = draws_of(model, o.counters, o.antithetic, o.stochastic_rounding)
    call = (model["param"], model["grad"], state_of(model), draws)
    if backend is None:
        reference.gauss_newton(*call, math.sqrt(o.evidence), amp_of(model, o))
    else:
        ops.gauss_newton(*call, o.evidence, amp_of(model, o), backend=backend.name)
    return draws.counters.tolist()


def sample(model, counters, antithetic=False, stochastic_rounding=False, backend=None):
    call = (model["param"], state_of(model), draws_of(model, counters, antithetic, stochastic_rounding))
    reference.sample(*call) if backend is None else ops.sample(*call, backend=backend.name)


def normals(model, i, draw, antithetic=False):
    _, eps = words_and_normals(
        model["mean"][i].numel(),
        offset=model.offsets[i],
        stream=model.streams[i],
        seed=SEED,
        draw=draw,
        antithetic=antithetic,
        device=torch.device("cpu"),
    )
    return eps
