"""What a model is to this library, wherever it comes from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import distributed
from ..data import tables
from ..data.inputs import Inputs
from ..data.raw import named
from ..data.requests import Selection, in_folder, in_table
from ..errors import UsageError
from ..files import write_atomically
from ..sharding import gather

SERVING = "serving"
"""The key of a posterior's metadata, and of a weights file's, under which `Model.facts` are kept."""


class Writer(Protocol):
    """Writes a model in the form that it came in."""

    def __call__(self, network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
        """Write it, whole or not at all."""


@dataclass
class Model:
    """A model with what it takes to serve alone.

    Attributes:
        name: as the user spells it.
        network: the module; without weights where only its shape was asked for.
        classes: names in the order of the head; ``None`` where nobody has said them.
        inputs: how an image becomes its input; ``None`` where nobody has said it.
        input_shape: of one input, (channels, height, width).
        origin: of the training data.
        write: see `Writer`.
        folder: whether the form is a folder.
        data: where its training data was, for those that remember it.
        config: of our own files.
    """

    name: str
    network: nn.Module
    classes: tuple[str, ...] | None
    inputs: Inputs | None
    input_shape: tuple[int, int, int]
    write: Writer
    origin: str = ""
    folder: bool = False
    data: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What a posterior and a file of weights have to know of it."""
        return {
            "classes": None if self.classes is None else list(self.classes),
            "images": None if self.inputs is None else self.inputs.facts(),
            "origin": self.origin,
        }

    def agree_with(self, facts: Mapping[str, Any] | None, what: str) -> None:
        """Take from ``facts`` what is not known here.

        Raises:
            UsageError: they say something else of the classes or of the images; names both sides.
        """
        if facts is None:
            return
        theirs = json.loads(json.dumps(facts))
        mine = json.loads(json.dumps(self.facts()))
        if theirs["classes"] is not None:
            if mine["classes"] is not None and mine["classes"] != theirs["classes"]:
                raise UsageError(
                    f"the model {self.name} has the classes {named(mine['classes'], 20)}, and {what} those of another: "
                    f"{named(theirs['classes'], 20)}"
                )
            self.classes = tuple(theirs["classes"])
        if mine["images"] is not None and theirs["images"] is not None and mine["images"] != theirs["images"]:
            keys = [
                k for k in {**mine["images"], **theirs["images"]} if mine["images"].get(k) != theirs["images"].get(k)
            ]
            sides = "; ".join(f"{k}: {mine['images'].get(k)} here, {theirs['images'].get(k)} there" for k in keys)
            raise UsageError(f"the model {self.name} takes its images in another way than {what} says: {sides}")
        self.origin = self.origin or theirs["origin"]

    def select(
        self,
        folder: str | Path,
        *,
        classes: Sequence[str] = (),
        records: str | Path | None = None,
        part: str = "train",
    ) -> Selection:
        """The images of a request: see `in_folder` and `in_table` of `distruction.data.requests`.

        Raises:
            UsageError: see there; or the model's classes are not known.
        """
        place, known = Path(folder), self.known_classes()
        listed = None if records is None else Path(records)
        if tables.holds(place):
            return in_table(tables.open_table(place, part), known, wanted=classes, records=listed)
        return in_folder(place, known, wanted=classes, records=listed, part=part)

    def known_classes(self) -> tuple[str, ...]:
        """The classes.

        Raises:
            UsageError: nobody has said them.
        """
        if self.classes is None:
            raise UsageError(
                f"nothing says which classes {self.name} tells apart: pass --classes FILE, a name a line in the order "
                "of its head"
            )
        return self.classes


def write_state(network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the state_dict: safetensors with ``facts`` in its header, or, of a name in .pt or .pth, by `torch.save`.

    All ranks of a sharded model call it together, and the first writes.
    """
    state = {name: gather(t.detach()).cpu().contiguous() for name, t in network.state_dict().items()}
    if distributed.rank() > 0:
        return
    if path.suffix in (".pt", ".pth", ".bin", ".tar"):
        write_atomically(path, lambda name: torch.save(state, name))
        return
    seen: set[int] = set()
    for name, t in state.items():
        where = t.untyped_storage().data_ptr()
        if where in seen:
            state[name] = t.clone()  # safetensors refuses names that share memory
        seen.add(where)
    header = {SERVING: json.dumps(facts)}
    write_atomically(path, lambda name: save_file(state, name, header))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file of safetensors or of `torch.save`, of the EMA where it has them, and the facts beside them.

    Raises:
        UsageError: it is missing, damaged, or holds something else than tensors.
    """
    import argparse

    if not path.is_file():
        raise UsageError(f"no weights at {path}: pass a file of safetensors or of torch.save")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                facts = (file.metadata() or {}).get(SERVING)
            return load_file(path), None if facts is None else json.loads(facts)
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, EOFError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as weights: {_line(error)}") from error
    except Exception as error:  # pickle's errors are of many kinds
        raise UsageError(f"{path} cannot be read as weights: {_line(error)}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UsageError(f"{path} holds no state_dict")
    return {name.removeprefix("module."): t for name, t in found.items()}, None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_weights(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Put weights into a module.

    Raises:
        UsageError: they are of another model.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        own = network.state_dict()
        reasons = [
            f"{verb} {named(names)}"
            for verb, names in (
                ("it lacks", [n for n in own if n not in state]),
                ("it also has", [n for n in state if n not in own]),
            )
            if names
        ]
        reasons += [
            f"{n} is {list(t.shape)} there and {list(own[n].shape)} here"
            for n, t in state.items()
            if n in own and t.shape != own[n].shape
        ][:1]
        raise UsageError(f"{what} is of another model: {'; '.join(reasons) or str(error).splitlines()[-1]}") from error
