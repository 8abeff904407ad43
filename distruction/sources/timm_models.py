"""timm's models: by name with a file of weights, or as the run folder that its train.py wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.folder import class_folders
from ..data.inputs import Called
from ..errors import UsageError
from ..extras import needed
from .base import Model, load_weights, read_state, write_state

with needed("vision"):
    import timm
    import yaml
    from timm.data import create_transform, resolve_data_config
    from timm.data.readers.class_map import load_class_map
    from timm.utils import natural_key

CHECKPOINTS = ("model_best.pth.tar", "last.pth.tar")


def is_run(folder: Path) -> bool:
    """Whether train.py wrote the folder."""
    return (folder / "args.yaml").is_file()


def open_name(
    spec: str,
    *,
    weights: Path | None,
    classes: tuple[str, ...] | None,
    device: str | torch.device = "cpu",
    read: bool = True,
) -> Model:
    """timm's model of that name with the weights of a file, which also say the size of its head."""
    if weights is None:
        raise UsageError(f"{spec} is a name of timm's: pass the file of its trained weights by --weights")
    state, facts = read_state(weights)
    with torch.device("meta"):
        plain: Any = timm.create_model(spec)
    cfg: dict[str, Any] = plain.pretrained_cfg or {}
    arguments = {
        "num_classes": _size(state, cfg.get("classifier"), 0, plain.num_classes),
        "in_chans": _size(state, cfg.get("first_conv"), 1, 3),
    }
    model = _opened(spec, arguments, state if read else None, {}, str(weights), device)
    model.classes = classes
    model.agree_with(facts, str(weights))
    return _checked(model)


def open_run(
    folder: Path,
    *,
    weights: Path | None,
    classes: tuple[str, ...] | None,
    device: str | torch.device = "cpu",
    read: bool = True,
) -> Model:
    """The model of a run of train.py: its best checkpoint, or its last, and of either the EMA where there is one."""
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text())
        arguments = {
            "num_classes": args["num_classes"],
            "in_chans": args.get("in_chans"),
            "global_pool": args.get("gp"),
            **(args.get("model_kwargs") or {}),
        }
        name = args["model"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'args.yaml'} cannot be read as arguments of timm's train.py: {error}") from error
    if weights is None:
        weights = next((folder / c for c in CHECKPOINTS if (folder / c).is_file()), None)
        if weights is None:
            raise UsageError(f"{folder} has neither {' nor '.join(CHECKPOINTS)}: pass a file of weights by --weights")
    state, facts = read_state(weights) if read else ({}, None)
    arguments = {k: v for k, v in arguments.items() if v is not None}
    if read and "num_classes" not in arguments:
        with torch.device("meta"):
            plain: Any = timm.create_model(name)
        arguments["num_classes"] = _size(state, (plain.pretrained_cfg or {}).get("classifier"), 0, plain.num_classes)
    model = _opened(name, arguments, state if read else None, args, str(weights), device)
    model.name = str(folder)
    root = args.get("data_dir") or args.get("data")
    model.data = Path(root) if root else None
    model.origin = str(root or "")
    model.classes = classes or _classes_of_run(args, model.data, getattr(model.network, "num_classes", None))
    model.agree_with(facts, str(weights))
    return _checked(model)


def _classes_of_run(args: Mapping[str, Any], root: Path | None, outputs: int | None) -> tuple[str, ...] | None:
    """As train.py numbers them: its class map, or the folders in natural order, as long as all of them are there."""
    if args.get("class_map"):
        try:
            found = load_class_map(args["class_map"], root or "")
        except (OSError, AssertionError) as error:
            raise UsageError(f"the run's class map {args['class_map']} cannot be read: {error}") from error
        return tuple(sorted(found, key=found.__getitem__))
    if root is None or not root.is_dir():
        return None
    folder = root / args.get("train_split", "train")
    names = class_folders(folder if folder.is_dir() else root)
    return tuple(sorted(names, key=natural_key)) if len(names) == outputs else None


def _size(state: Mapping[str, Tensor], module: Any, dimension: int, default: int) -> int:
    """The size of a module's weight in a file, of the first where timm names several."""
    if isinstance(module, tuple | list):
        module = module[0] if module else None
    weight = state.get(f"{module}.weight")
    return default if weight is None else weight.shape[dimension]


def _opened(
    name: str,
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor] | None,
    args: Mapping[str, Any],
    what: str,
    device: str | torch.device,
) -> Model:
    if state is None:
        with torch.device("meta"):
            network = timm.create_model(name, **arguments)
    else:
        network = timm.create_model(name, **arguments)
        load_weights(network, state, what)
        network.to(device)
    config = resolve_data_config(dict(args), model=network)
    transform = create_transform(**config)
    shape = config["input_size"]
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    told = {"kind": "timm", **{k: config[k] for k in keys if k in config}}

    def write(network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
        write_state(network, path, facts)

    inputs = Called(lambda image: _tensor(transform(image)), shape[0], told)
    return Model(name, network, None, inputs, (shape[0], shape[1], shape[2]), write)


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _checked(model: Model) -> Model:
    """The model, whose head has as many outputs as there are classes.

    Raises:
        UsageError: it has not.
    """
    outputs = getattr(model.network, "num_classes", None)
    if model.classes is not None and outputs != len(model.classes):
        raise UsageError(f"{model.name} has {outputs} outputs, but {len(model.classes)} classes are named")
    return model
