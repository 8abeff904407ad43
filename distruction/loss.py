"""The KL penalty as a loss for (mean, std) parameters of any module."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from . import ops
from .posterior import Posterior


def gaussian_kl(
    mean: Sequence[Tensor] | Tensor,
    std: Sequence[Tensor] | Tensor,
    prior_mean: Sequence[Tensor] | Tensor,
    prior_std: Sequence[Tensor] | Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """KL(N(mean, std**2) || N(prior_mean, prior_std**2)), summed over all elements.

    ``0.5 * (((mean - mean_p) / std_p)**2 + r - 1 - log r)`` with ``r = (std / std_p)**2`` (paper, section 3.2),
    evaluated without cancellation near ``q = p``.

    Args:
        mean, std, prior_mean, prior_std: tensors or lists of tensors of equal shapes, float32 (float64 with
            ``backend="reference"``); every std > 0. Differentiable in ``mean`` and ``std``.
        backend: see `distruction.ops`.

    Returns:
        A float64 scalar, in nats.

    >>> import torch
    >>> mean, std = torch.zeros(4, requires_grad=True), torch.full((4,), 0.1)
    >>> kl = gaussian_kl(mean, std, torch.full((4,), 0.1), std)
    >>> kl.backward()
    >>> kl.item(), mean.grad
    (2.0, tensor([-10., -10., -10., -10.]))
    """
    lists = [[t] if isinstance(t, Tensor) else list(t) for t in (mean, std, prior_mean, prior_std)]
    kl: Tensor = ops.gaussian_kl(*lists, backend=backend)[0]
    return kl


class GaussianKL(nn.Module):
    """``kl_weight * KL(q || prior)`` for q given by dictionaries of mean and std parameters.

    Args:
        prior: the posterior of preparation; moves with the module as buffers do.
        kl_weight: lambda of the paper, >= 0.
        backend: see `distruction.ops`.

    >>> import torch
    >>> prior = Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    >>> penalty = GaussianKL(prior, kl_weight=0.5)
    >>> float(penalty({"w": torch.ones(2)}, {"w": torch.ones(2)}))
    0.5
    """

    def __init__(self, prior: Posterior, *, kl_weight: float = 1.0, backend: str = "auto") -> None:
        super().__init__()
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight must be >= 0, not {kl_weight}")
        self.names = list(prior)
        self.kl_weight = kl_weight
        self.backend = backend
        for i, (mean, std) in enumerate(prior.values()):
            self.register_buffer(f"mean_{i}", mean, persistent=False)
            self.register_buffer(f"std_{i}", std, persistent=False)

    def forward(self, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> Tensor:
        """The weighted KL, a float64 scalar.

        Args:
            mean, std: parameter name to tensor, for each name of the prior.
        """
        index = range(len(self.names))
        kl = gaussian_kl(
            [mean[n] for n in self.names],
            [std[n] for n in self.names],
            [self.get_buffer(f"mean_{i}") for i in index],
            [self.get_buffer(f"std_{i}") for i in index],
            backend=self.backend,
        )
        return self.kl_weight * kl
