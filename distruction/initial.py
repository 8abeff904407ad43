"""The std that a preparation starts from, tensor by tensor: as wide as the tensor's own initialisation would be.

A Gauss-Newton preparation narrows every weight that the data determines within its first steps, so that a wide start
costs nothing; a narrow one holds weights that the data leaves free, and forgetting then has to move others. The scale
of a weight is that of a fresh initialisation, 1 / sqrt(fan_in) (LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998,
section 4.6), not the size of the trained one, which weight decay may have shrunk.
"""

from torch import Tensor, nn

from .modules import learnable
from .sharding import gather

SMALLEST = 1e-3
"""Of a tensor of zeros that belongs to no known kind of layer."""

_WEIGHTED = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def initial_std(model: nn.Module) -> dict[str, float]:
    """One std per learnable tensor, by the bare model's names.

    - linear layers and convolutions: 1 / sqrt(fan_in), their biases as well;
    - normalisation layers (modules whose class is named a norm): 1;
    - everything else, such as embeddings, class tokens, positions, layer scales: the root mean square of its values.

    >>> initial_std(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))
    {'0.weight': 0.5, '0.bias': 0.5, '1.weight': 1.0, '1.bias': 1.0}
    """
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    return {name: _std_of(p, owners[id(p)]) for name, p in learnable(model).items()}


def _std_of(p: Tensor, owner: nn.Module) -> float:
    if "norm" in type(owner).__name__.lower() and p.ndim <= 1:
        return 1.0
    fan_in = _fan_in(p, owner)
    if fan_in is not None:
        return float(fan_in**-0.5)
    return max(gather(p.detach()).float().square().mean().sqrt().item(), SMALLEST)


def _fan_in(p: Tensor, owner: nn.Module) -> int | None:
    """Inputs of each output of a linear layer or convolution; ``None`` of any other."""
    weights = [w for w in owner.parameters(recurse=False) if w.ndim >= 2 and w.numel()]
    # A bias has the scale of the weight beside it.
    weight = p if p.ndim >= 2 else next(iter(weights), None)
    if weight is None or weight.numel() == 0:
        return None
    if isinstance(owner, _TRANSPOSED):
        return weight.numel() // (weight.shape[1] * owner.groups)
    if type(owner).__name__ == "Conv1D":  # transformers': (inputs, outputs)
        return weight.shape[0]
    return weight.numel() // weight.shape[0] if isinstance(owner, _WEIGHTED) else None
