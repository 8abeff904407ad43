"""Unlearning objectives of causal language models: preferences over whole texts, and steering of hidden states.

Those of `distruction.objectives` take tokens for examples and serve language models as they are: ``bounded-ce`` bounds
the likelihood of each token, ``masked-teacher`` and ``uniform`` say what the next token is to be instead.
"""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .errors import UsageError
from .loop.tokens import Sequences
from .modules import unwrapped
from .posterior import Posterior
from .teachers import AtMeans


def log_likelihoods(logits: Tensor, inputs: Sequences) -> Tensor:
    """log p(answer | prompt) of each text: the sum over its tokens that are asked for, float32, (texts,)."""
    return inputs.per_text(-F.cross_entropy(logits.float(), inputs.tokens, reduction="none"))


def _of_text(inputs: Any, name: str) -> Sequences:
    if not isinstance(inputs, Sequences):
        raise UsageError(
            f"{name} is for causal language models, whose batches are mappings with input_ids and labels (rows, "
            "length): choose another objective"
        )
    return inputs


class NPO:
    """Negative preference optimisation: mean over texts of -2/beta log sigmoid(-beta log(p(y | x) / p_ref(y | x))).

    Zhang, Lin, Bai, Mei, "Negative Preference Optimization", 2024, arXiv 2404.05868, equation 3, without data to
    retain, for which the KL stands in. p_ref is the model at the posterior's means; its log-likelihood of each text
    is computed once and kept as a number, so that no copy of the model is.

    Args:
        reference: inputs -> logits of the model before forgetting.
        beta: inverse temperature, > 0; towards 0 it is gradient ascent.

    Raises:
        UsageError: beta is out of range.
    """

    needs_inputs = True
    per_text = True

    def __init__(self, reference: AtMeans, beta: float = 0.1) -> None:
        _require_positive("beta", beta)
        self._reference = reference
        self._known: dict[bytes, float] = {}
        self.beta = beta

    @torch.no_grad()
    def before_passes(self, inputs: Any) -> None:
        """Compute the reference's log-likelihoods of texts that were not met before."""
        inputs = _of_text(inputs, "npo")
        keys = _keys(inputs)
        missing = any(key not in self._known for key in keys)
        # A sharded model needs every rank in its forward pass.
        if distributed.on_any_rank(missing, inputs.labels.device):
            found = log_likelihoods(self._reference(inputs), inputs)
            self._known.update(zip(keys, found.tolist(), strict=True))

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss of a batch."""
        inputs = _of_text(inputs, "npo")
        keys = _keys(inputs)
        if any(key not in self._known for key in keys):
            self.before_passes(inputs)
        reference = torch.tensor([self._known[key] for key in keys], device=logits.device)
        ratio = log_likelihoods(logits, inputs) - reference
        return -2 / self.beta * F.logsigmoid(-self.beta * ratio).mean()


class SimNPO:
    """NPO without a reference: mean over texts of -2/beta log sigmoid(-beta/|y| log p(y | x) - gamma).

    Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024, arXiv
    2410.07163, equation 4. |y| is the number of tokens that are asked for, so that long texts weigh no more.

    Args:
        beta: inverse temperature, > 0.
        gamma: margin, >= 0.

    Raises:
        UsageError: an argument is out of range.
    """

    needs_inputs = True
    per_text = True

    def __init__(self, beta: float = 2.5, gamma: float = 0.0) -> None:
        _require_positive("beta", beta)
        if not gamma >= 0:
            raise UsageError(f"gamma must be >= 0, not {gamma}")
        self.beta = beta
        self.gamma = gamma

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss of a batch."""
        inputs = _of_text(inputs, "simnpo")
        length = inputs.per_text(torch.ones_like(inputs.tokens, dtype=torch.float32))
        mean = log_likelihoods(logits, inputs) / length
        return -2 / self.beta * F.logsigmoid(-self.beta * mean - self.gamma).mean()


class Steering:
    """RMU's forget loss: mean over tokens of |h_t - c u|**2, h_t the hidden state of a layer, u a random direction.

    Li et al., "The WMDP Benchmark", 2024, arXiv 2403.03218, section 4: u is a unit vector with entries drawn uniformly
    from [0, 1). Of their retain loss the KL takes the place. The tokens are the positions that answer for the labels.

    Args:
        model: the model; the layer is watched by a hook from `before_passes` until `remove`.
        layer: name of the module whose output is steered; ``None``: the middle one of the longest list of modules.
        coefficient: c, > 0; on the scale of the hidden states' norm.
        seed: of u.

    Raises:
        UsageError: there is no such layer, or c is out of range.
    """

    needs_inputs = True

    def __init__(self, model: nn.Module, layer: str | None = None, coefficient: float = 6.5, seed: int = 0) -> None:
        _require_positive("coefficient", coefficient)
        modules = dict(unwrapped(model).named_modules())
        if layer is None:
            lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)}
            if not lists:
                raise UsageError("the model has no list of layers: name the one to steer, Steering(model, layer=...)")
            longest = max(lists, key=lambda name: len(lists[name]))
            layer = f"{longest}.{len(lists[longest]) // 2}"
        if layer not in modules:
            raise UsageError(f"the model has no module {layer!r}; choose one of model.named_modules()")
        self.layer = layer
        self.coefficient = coefficient
        self.seed = seed
        self._hidden: list[Tensor] = []
        self._direction: Tensor | None = None
        self._module = modules[layer]
        self._handle: Any = None

    def before_passes(self, inputs: Any) -> None:
        """Watch the layer from now on."""
        if self._handle is None:
            self._handle = self._module.register_forward_hook(self._watch)

    def remove(self) -> None:
        """Watch the layer no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _watch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._hidden[:] = [output[0] if isinstance(output, tuple) else output]

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss of a batch."""
        inputs = _of_text(inputs, "rmu")
        if not self._hidden:
            raise UsageError(
                f"no pass through {self.layer} was watched: call before_passes first, or choose a layer that is used"
            )
        hidden = self._hidden.pop()[:, :-1][inputs.where].float()
        if self._direction is None or self._direction.device != hidden.device:
            u = torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(self.seed))
            self._direction = (u / u.norm()).to(hidden.device)
        return (hidden - self.coefficient * self._direction).square().sum(dim=-1).mean()


def npo(model: nn.Module, posterior: Posterior, forgotten: Any) -> NPO:
    """`NPO` against the model at the posterior's means."""
    return NPO(AtMeans(model, posterior))


def _keys(inputs: Sequences) -> list[bytes]:
    """A digest of each text, of its tokens before and among those that are asked for; padding does not count."""
    keys = []
    rows, columns = inputs.where.nonzero(as_tuple=True)
    ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    rows, columns, texts = rows.cpu(), columns.cpu(), inputs.texts.cpu()
    for text in range(inputs.count_texts()):
        own = texts == text
        row, last = int(rows[own][0]), int(columns[own][-1]) + 1
        first = 0
        if positions is not None:
            starts = (positions[row, : int(columns[own][0]) + 1] == 0).nonzero()
            first = int(starts[-1]) if len(starts) else 0
        seen = ids[row, first : last + 1]
        if mask is not None and mask.ndim == 2:
            seen = seen[mask[row, first : last + 1].cpu() != 0]
        asked = columns[own] - last
        keys.append(hashlib.sha256(seen.numpy().tobytes() + b"|" + asked.numpy().tobytes()).digest())
    return keys


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"{name} must be > 0, not {value}")
