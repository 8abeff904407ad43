"""Causal language models: folders that Hugging Face's ``save_pretrained`` wrote, with their tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..extras import needed
from ..report import folder as whole_folder
from .base import SERVING
from .hugging_face import _quiet


@dataclass
class LanguageModel:
    """A causal language model with what it takes to serve alone.

    Attributes:
        name: as the user spells it.
        network: the module; without weights where only its shape was asked for.
        tokenizer: of transformers; ``None`` likewise.
    """

    name: str
    network: nn.Module
    tokenizer: Any

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the model and its tokenizer as a folder, whole or not at all."""
        with _quiet(), whole_folder(path, overwrite=True) as draft:
            self.network.save_pretrained(str(draft))  # type: ignore[operator]
            self.tokenizer.save_pretrained(str(draft))
            (draft / "distruction.json").write_text(json.dumps({SERVING: facts}, indent=2) + "\n")


def is_language_model(spec: str | Path) -> bool:
    """Whether it is a folder whose config names a causal language model."""
    try:
        config = json.loads((Path(spec) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    made = (config.get("architectures") if isinstance(config, dict) else None) or [""]
    return str(made[0]).endswith(("ForCausalLM", "LMHeadModel"))


def open_language_model(spec: str | Path, *, device: str | torch.device = "cpu", weights: bool = True) -> LanguageModel:
    """The model and its tokenizer; nothing is fetched.

    Args:
        weights: false leaves the weights and the tokenizer unread.

    Raises:
        MissingPackage: transformers is not installed.
        UsageError: the folder cannot be read.
    """
    folder = str(spec)
    with needed("language", f"{folder}, a folder of Hugging Face's,"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    tokenizer: Any = None
    try:
        if weights:
            with _quiet():
                network: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network.to(device).eval()
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{folder} cannot be read as a language model with its tokenizer: {reason}") from error
    return LanguageModel(folder, network, tokenizer)
