"""Tensors and options to run the ops on, and the calls, by a backend or by the reference."""

from dataclasses import dataclass, field

import torch

from distruction import ops
from distruction.ops import reference
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


def step(model, o, backend=None):
    """One step, by the reference if there is no backend; returns the counters and the KL."""
    device = model["mean"][0].device
    counters = torch.tensor(o.counters, device=device)
    arguments = (
        *(model[name] for name in ("param", "mean", "std", "grad")),
        *(model["m1"] if o.statistics or o.pair else [], model["m2"] if o.statistics else []),
        *((model["prior_mean"], model["prior_std"]) if o.prior else ([], [])),
        *(torch.tensor(o.lr, device=device), torch.tensor(o.kl_weight, device=device), o.loss_scale),
        *(model.offsets, model.streams, SEED, counters, o.antithetic, o.stochastic_rounding),
        *(o.max_mean_step, o.max_log_std_step, o.max_std, o.learn_mean, o.learn_std),
        *(optional(o.grad_scale, device), optional(o.found_inf, device)),
    )
    kl = reference.step(*arguments) if backend is None else ops.step(*arguments, backend=backend.name)
    return counters.tolist(), kl.item()


def gauss_newton(model, o, backend=None):
    """One Gauss-Newton update, by the reference if there is no backend; returns the counters."""
    device = model["mean"][0].device
    counters = torch.tensor(o.counters, device=device)
    arguments = (
        *(model[name] for name in ("param", "std", "grad", "mean")),
        *(o.evidence, model.offsets, model.streams, SEED, counters, o.antithetic, o.stochastic_rounding),
        *(optional(o.grad_scale, device), optional(o.found_inf, device)),
    )
    if backend is None:
        reference.gauss_newton(*arguments)
    else:
        ops.gauss_newton(*arguments, backend=backend.name)
    return counters.tolist()


def sample(model, counters, antithetic=False, stochastic_rounding=False, backend=None):
    counters = torch.tensor(counters, device=model["mean"][0].device)
    where = (model.offsets, model.streams, SEED, counters, antithetic, stochastic_rounding)
    lists = (model["param"], model["mean"], model["std"])
    (reference.sample if backend is None else ops.sample)(*lists, *where, *([] if backend is None else [backend.name]))


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
