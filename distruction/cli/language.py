"""What the commands do where ``--model`` is a folder of a causal language model: texts come from JSON lines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from .. import distributed, forgetting, language_metrics, planning, preparation
from ..data.texts import FORM, longest_of, read_texts, text_batches, tokens_of
from ..errors import UsageError
from ..posterior import Posterior
from ..report import table
from ..sources.language import LanguageModel, is_language_model, open_language_model
from .options import beside_means, device_of, done, holds, output
from .running import Running

__all__ = ["evaluate", "forget", "is_language_model", "plan", "prepare"]


def _only(**options: Any) -> None:
    """Refuse options that say something of images."""
    for name, value in options.items():
        if value:
            raise UsageError(
                f"--{name.replace('_', '-')} is for images, and the model is a language model: leave it out; its texts "
                f"come from --data FILE, a line {FORM} for each"
            )


def _texts(source: LanguageModel, data: Path | None, batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    if data is None:
        raise UsageError(f"no texts are named: pass --data FILE, a line {FORM} for each")
    rows = tokens_of(read_texts(data), source.tokenizer, longest_of(source.network), data)
    if distributed.rank() == 0:
        tokens = sum(len(ids) - max(prompt, 1) for ids, prompt in rows)
        Console().print(f"{data}: {len(rows)} texts, of which {tokens:,} tokens are asked for", highlight=False)
    return text_batches(rows, batch_size=batch_size, shuffle=shuffle)


def prepare(
    model: str,
    out: Path,
    data: Path | None,
    batch_size: int,
    images: dict[str, Any],
    running: Running,
    *,
    compress: bool,
    **options: Any,
) -> None:
    """Learn the posterior of a language model; ``options`` are those of `distruction.prepare`."""
    _only(**images)
    source = open_language_model(model, device=device_of(running.device))
    batches = _texts(source, data, batch_size, shuffle=True)
    posterior = preparation.prepare(source.network, batches, **options)
    if distributed.rank() > 0:
        return
    posterior.save(out, compress=compress)
    done(running.checkpoint)
    Console().print(f"{out}: {posterior.numel():,} Gaussians; {beside_means(posterior, 'tokens')}", soft_wrap=True)


@dataclass(frozen=True)
class Files:
    """What `forget` reads and writes, as its options call them."""

    model: str
    data: Path | None
    posterior: Path
    previous: Path | None
    out: Path
    posterior_out: Path | None


def forget(
    files: Files, batch_size: int, images: dict[str, Any], running: Running, *, dry_run: bool, **options: Any
) -> None:
    """Forget the texts; ``options`` are those of `distruction.forget`."""
    _only(**images)
    source = open_language_model(files.model, device=device_of(running.device))
    output(files.out, running.overwrite, folder=True)
    if files.posterior_out is not None:
        output(files.posterior_out, running.overwrite)
    network = source.network
    prior = Posterior.load(files.posterior, model=network)
    earlier = None if files.previous is None else Posterior.load(files.previous, model=network)
    if earlier is not None and holds(network, prior):
        earlier.mean_(network)  # what the earlier request made of it; the folder of preparation serves as well
    batches = _texts(source, files.data, batch_size, shuffle=True)
    if dry_run:
        return
    if options["offload_prior"] and torch.cuda.is_available():
        prior = prior.pin_memory()
    result = forgetting.forget(network, prior, batches, previous=earlier, **options)
    if distributed.rank() > 0:
        return
    if files.posterior_out is not None:
        result.posterior.save(files.posterior_out)
    source.write(files.out, {"origin": files.model})
    done(running.checkpoint)
    console = Console()
    console.print(
        f"{files.out}: KL(q || p) {result.kl:.1f} nats after {len(result.history)} steps in {result.seconds:.1f} s; "
        f"mean probability of the forgotten tokens {result.probability:.2g}",
        soft_wrap=True,
    )
    if result.advice:
        console.print(f"The level {result.level} is not reached: {result.advice}.", soft_wrap=True)


def evaluate(model: str, *, data: Path | None, device: str, images: dict[str, Any], batch_size: int = 32) -> None:
    """Perplexity of the tokens that the texts ask for, and the share of answers that greedy decoding gives."""
    _only(**images)
    source = open_language_model(model, device=device_of(device))
    batches = _texts(source, data, batch_size)
    answered, likelihoods = language_metrics.read_answers(source.network, batches)
    row = {"perplexity": language_metrics.perplexity(likelihoods), "answered": 100.0 * answered.double().mean().item()}
    columns = {"perplexity": "perplexity", "answered": "given by greedy decoding, %"}
    Console().print(table(str(data), {model: row}, columns))


def plan(model: str, length: int, **options: Any) -> planning.Plan:
    """The plan of texts of ``length`` tokens; ``options`` are those of `distruction.planning.plan`."""
    return planning.plan(open_language_model(model, weights=False).network, (), length=length, **options)
