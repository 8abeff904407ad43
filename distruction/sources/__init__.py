"""Where models come from: one spelling for each kind, and the form in which the result is written.

| spelling                               | model                                         | result                 |
|----------------------------------------|-----------------------------------------------|------------------------|
| a file that `distruction train` wrote  | ours                                          | such a file            |
| a timm name, with a file of weights    | `timm.create_model`                           | a state_dict for timm  |
| a folder with ``args.yaml``            | of timm's train.py: its best checkpoint's EMA | a state_dict for timm  |
| a folder with ``config.json``          | of Hugging Face's ``save_pretrained``         | such a folder          |
| ``package.module:function``            | what the function returns                     | a state_dict           |

Nothing is fetched from a network.
"""

from pathlib import Path

import torch

from ..errors import UsageError
from ..extras import needed
from . import factory, hugging_face, own, timm_models
from .base import SERVING, Model, write_state

with needed("vision"):
    import timm

__all__ = ["SERVING", "Model", "open_model", "read_classes", "write_state"]


def open_model(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    classes: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
    read: bool = True,
) -> Model:
    """The model that ``spec`` names: see the module.

    Args:
        weights: a file of weights, for a timm name (needed), a run of train.py (instead of its checkpoint) and a
            function (in place of the weights that it returns).
        classes: names in the order of the head, where the model does not say them.
        device: where the weights go.
        read: false leaves the weights unread where the shapes can be had without them.

    Raises:
        UsageError: there is no such model, or its parts do not fit together.
    """
    spec = str(spec)
    path = Path(spec)
    file = None if weights is None else Path(weights)
    if path.is_dir():
        if timm_models.is_run(path):
            return timm_models.open_run(path, weights=file, classes=classes, device=device, read=read)
        if hugging_face.is_folder(path):
            model = hugging_face.open_folder(path, device=device, weights=read)
        else:
            raise UsageError(f"{spec} is no folder of timm's train.py (args.yaml) or of save_pretrained (config.json)")
    elif path.is_file():
        model = own.open_file(spec, device=device, weights=read)
    elif ":" in spec and all(part.isidentifier() for part in spec.replace(":", ".").split(".")):
        return factory.open_call(spec, weights=file, classes=classes, device=device, read=read)
    elif timm.is_model(spec):
        return timm_models.open_name(spec, weights=file, classes=classes, device=device, read=read)
    else:
        raise UsageError(
            f"no model file at {spec}, and it is no name of timm's, no folder of train.py or save_pretrained and no "
            "package.module:function; write a file with `distruction train`"
        )
    if file is not None:
        raise UsageError(f"{spec} holds its weights: drop --weights {weights}")
    if classes is not None and model.classes is not None and classes != model.classes:
        raise UsageError(f"{spec} has the classes {', '.join(model.classes)}, not {', '.join(classes)}: drop --classes")
    model.classes = model.classes or classes
    return model


def read_classes(path: Path | None) -> tuple[str, ...] | None:
    """The names in a file, one a line.

    Raises:
        UsageError: it is missing, empty or names one twice.
    """
    if path is None:
        return None
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as names of classes: {error}") from error
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{path} must name each class once, a name a line")
    return names
