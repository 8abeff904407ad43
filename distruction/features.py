"""What a model hands to its classifier: the penultimate features, in which a class may live on that no logit shows."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .loop.batches import Batch
from .modules import deterministic, logits_of, unwrapped

if TYPE_CHECKING:
    from .data import Examples


def classifier_of(model: nn.Module, name: str | None = None) -> nn.Module:
    """The layer that gives the logits: the named one, timm's ``get_classifier()``, or the last ``nn.Linear``.

    Args:
        name: as in ``model.named_modules()``; ``None`` looks for it.

    Raises:
        UsageError: there is no module of that name, or none is found.
    """
    model = unwrapped(model)
    if name is not None:
        found: nn.Module | None = dict(model.named_modules()).get(name)
        if found is None or not name:
            heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-3:]
            raise UsageError(
                f"the model has no layer {name!r} that could be its classifier; its last linear layers are "
                f"{', '.join(heads) or 'none'}"
            )
        return found
    known = getattr(model, "get_classifier", None)
    if callable(known) and isinstance(layer := known(), nn.Linear):
        return layer
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UsageError("the model has no nn.Linear that could be its classifier; name the layer by classifier=")
    return linear[-1]


class Features:
    """The inputs of a model's classifier in its last forward pass; between ``with`` and its end.

    Args:
        model: gives logits, (batch, classes), from a layer that `classifier_of` finds.
        classifier: name of that layer.

    Attributes:
        rows: (batch, dimensions), of the whole batch after `gather`.
        active: whether it is listening.
    """

    rows: Tensor

    def __init__(self, model: nn.Module, classifier: str | None = None) -> None:
        self._layer = classifier_of(model, classifier)
        self._kept: tuple[Tensor, Any] | None = None

    active = False

    def __enter__(self) -> "Features":
        self.active = True
        self._hook = self._layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self.active = False
        self._kept = None
        self.__dict__.pop("rows", None)

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._kept = (inputs[0], output) if inputs else None

    def take(self) -> Tensor:
        """Those of the pass that has just ended, (batch, dimensions), with their graph.

        Raises:
            UsageError: the pass did not use the layer, or the layer does not give a row of logits for each example.
        """
        if self._kept is None:
            raise UsageError(
                "the forward pass did not reach the classifier (a model compiled by torch.compile may leave out hooks: "
                "compile it later), or the layer taken for it is another one: name it by classifier="
            )
        (features, output), self._kept = self._kept, None
        if not isinstance(output, Tensor) or output.flatten(1).shape != output.shape[:2]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"the layer taken for the classifier gives {shape}, not (batch, classes): name the layer that gives "
                "the logits by classifier="
            )
        return features.flatten(1)

    def gather(self, batch: Batch) -> None:
        """Put those of the whole batch into ``rows``; gradients flow to this rank's."""
        self.rows = batch.whole(self.take())


@torch.no_grad()
def features_of(model: nn.Module, data: "Examples", *, classifier: str | None = None) -> tuple[Tensor, Tensor]:
    """Penultimate features (N, dimensions) and labels (N,) of a whole data set, float32 on the CPU, in eval mode.

    Raises:
        UsageError: the data is empty, or the classifier is not found.
    """
    from .data import loader  # brings the readers of images, which the core does without

    if len(data) == 0:
        raise UsageError("there are no examples to take features of")
    device = next(model.parameters()).device
    rows = []
    with deterministic(model), Features(model, classifier) as tap:
        for x, y in loader(data, batch_size=512):
            logits_of(model(x.to(device)))
            rows.append((tap.take().float().cpu(), y.cpu()))
    features, labels = zip(*rows, strict=True)
    return torch.cat(features), torch.cat(labels)


def mean_cosine(features: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine similarity of the pairs of different examples that share a label; 0 where there is no such pair.

    With unit vectors u_i the pairs of n examples of a label give (|sum_i u_i|**2 - n) / (n (n - 1)).

    Args:
        features: (N, dimensions).
        targets: (N,) labels.
    """
    units = F.normalize(features, dim=-1)
    same = (targets[:, None] == targets[None, :]).to(units.dtype).fill_diagonal_(0)
    return (units @ units.T * same).sum() / same.sum().clamp(min=1)
