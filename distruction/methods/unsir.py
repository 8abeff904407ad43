"""UNSIR: impair with noise that maximises the forgotten class's loss, then repair with retain data.

Tarun, Chundawat, Mandal, Kankanhalli, "Fast Yet Effective Machine Unlearning", IEEE TNNLS 2023, arXiv 2111.08947.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data import loader
from ..errors import UsageError
from ..forget_report import ForgetReport
from ..modules import learnable
from .base import Method, Mixed, Selected, Task, fit, forget_with


def learn_noise(
    model: nn.Module, label: int, shape: tuple[int, ...], *, steps: int, lr: float = 0.1, penalty: float = 0.1
) -> Tensor:
    """A batch of inputs that maximises the model's loss for ``label``.

    Minimises -CE(model(noise), label) + penalty * mean squared norm of the noise, by Adam from standard normal noise.

    Args:
        shape: (batch, channels, height, width).
        penalty: keeps the noise bounded; the published code's 0.1.
    """
    device = next(model.parameters()).device
    noise = torch.randn(shape, device=device).requires_grad_()
    labels = torch.full(shape[:1], label, device=device)
    optimizer = torch.optim.Adam([noise], lr=lr)
    model.eval()
    for _ in range(steps):
        norm = noise.square().flatten(1).sum(dim=1).mean()
        loss = penalty * norm - F.cross_entropy(model(noise), labels)
        (noise.grad,) = torch.autograd.grad(loss, [noise])
        optimizer.step()
    return noise.detach()


def unsir(
    task: Task,
    *,
    noise_batch: int = 32,
    noise_steps: int = 25,
    noise_lr: float = 0.1,
    copies: int = 80,
    retain_per_class: int = 500,
    lr: float = 1e-4,
    impair_batch: int = 32,
    repair_batch: int = 128,
) -> None:
    """One epoch of Adam on noise under the forgotten label and retain samples, then one on the retain samples.

    Args:
        copies: how often the noise batch appears in the impair epoch.
        retain_per_class: retain examples of each label, the first ones of a random order.
    """
    noise, noise_labels = _noise(task, noise_batch, noise_steps, noise_lr, copies)
    order = torch.randperm(len(task.retain))
    labels = task.retain.labels[order]
    chosen = torch.cat([order[labels == c][:retain_per_class] for c in range(task.num_classes)])
    retain, retain_labels = Selected(task.retain, chosen), task.retain.labels[chosen]

    def loss_fn(logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    impair = Mixed((noise, noise_labels), (retain, retain_labels))
    optimizer = torch.optim.Adam(learnable(task.model).values(), lr=lr)
    fit(task.model, loader(impair, batch_size=impair_batch, shuffle=True), loss_fn, optimizer)
    optimizer = torch.optim.Adam(learnable(task.model).values(), lr=lr)
    repair = Mixed((retain, retain_labels))
    fit(task.model, loader(repair, batch_size=repair_batch, shuffle=True), loss_fn, optimizer)


def unsir_kl(
    task: Task,
    *,
    noise_batch: int = 32,
    noise_steps: int = 25,
    noise_lr: float = 0.1,
    copies: int = 80,
    **settings: Any,
) -> ForgetReport:
    """BGD on the noise under the forgotten label; the KL penalty stands for the retain samples and the repair.

    Do not expect it to forget: UNSIR's impair epoch forgets because retained samples claim whatever is not the noise,
    and nothing here draws the forgotten class's own images to another class. On digits D_f stays near 100 %.

    ``settings`` are those of `base.forget_with`.
    """
    noise, labels = _noise(task, noise_batch, noise_steps, noise_lr, copies)
    return forget_with(task, F.cross_entropy, Mixed((noise, labels)), **settings)


def _noise(task: Task, batch: int, steps: int, lr: float, copies: int) -> tuple[TensorDataset, Tensor]:
    forgotten = task.forget.labels.unique()
    if len(forgotten) != 1:
        raise UsageError(f"UNSIR forgets one class, but the forget set has the labels {forgotten.tolist()}")
    label = int(forgotten.item())
    shape = tuple(task.forget[[0]][0].shape[1:])
    noise = learn_noise(task.model, label, (batch, *shape), steps=steps, lr=lr).cpu().repeat(copies, 1, 1, 1)
    labels = torch.full((len(noise),), label)
    return TensorDataset(noise, labels), labels


PAPER = "Tarun, Chundawat, Mandal, Kankanhalli 2023, https://arxiv.org/abs/2111.08947"
METHOD = Method(
    "impair with error-maximising noise, repair with retain samples",
    PAPER,
    unsir,
    reads="part",
    sweep="lr",
    scenarios=("full-class", "sub-class"),
)
WITH_KL = Method(
    "impair with error-maximising noise, the KL penalty for the repair",
    PAPER,
    unsir_kl,
    reads="none",
    needs_posterior=True,
    sweep="kl_weight",
    scenarios=("full-class", "sub-class"),
)
