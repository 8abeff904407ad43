"""What the README and the pages show: every Python block runs, every name exists, every command line is one."""

import argparse
import importlib.util
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import typer

import distruction
import mkdocs_errors
from distruction import cli, rehearsal

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, *languages):
    """The fenced blocks of a page in one of these languages."""
    found, open_in, lines = [], None, []
    for line in page.read_text().splitlines():
        if not line.startswith("```"):
            lines.append(line)
        elif open_in is None:
            open_in, lines = line[3:].strip(), []
        else:
            found += ["\n".join(lines) + "\n"] if open_in in languages else []
            open_in = None
    return found


# --- Python --------------------------------------------------------------------------------------


def python_blocks():
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python")):
            # The README's doctest is one already.
            if not block.startswith(">>>"):
                yield pytest.param(block, id=f"{page.stem}-{number}")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks take as given: a small classifier, its data, an optimizer, a folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 3
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    data = torch.utils.data.TensorDataset(images, labels)
    return {
        "distruction": distruction,
        "torch": torch,
        "model": model,
        "loader": torch.utils.data.DataLoader(data, 12),
        "train_loader": torch.utils.data.DataLoader(data, 12),
        "held_out_loader": torch.utils.data.DataLoader(data, 12),
        "forget_loader": torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(0, 24, 3)), 4),
        "folder": tmp_path / "checkpoint",
    }


@pytest.fixture
def brief(monkeypatch):
    """Two steps of everything: the blocks show no number of steps."""
    for name in ("prepare", "forget"):
        function = getattr(distruction, name)
        monkeypatch.setattr(
            distruction, name, lambda *a, f=function, **o: f(*a, **{"steps": 2, "progress": False, **o})
        )
    monkeypatch.setattr(rehearsal, "forget", distruction.forget)


def hugging_face_folder():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    ViTForImageClassification(config).save_pretrained("my-vit")


def one_rank(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


@pytest.mark.parametrize("block", python_blocks())
@pytest.mark.usefixtures("brief")
def test_python_blocks_run(names, monkeypatch, block):
    grouped = "fully_shard" in block or "dcp." in block
    if "AutoModel" in block:
        transformers = pytest.importorskip("transformers")
        names["AutoModelForImageClassification"] = transformers.AutoModelForImageClassification
        hugging_face_folder()
        block = block.replace('"cuda"', '"cpu"')
    if grouped:
        from torch.distributed import checkpoint as dcp
        from torch.distributed.fsdp import fully_shard

        names |= {
            "dcp": dcp,
            "fully_shard": fully_shard,
            "opt": distruction.BGD(names["model"].parameters(), data_per_step=9.0),
        }
        if "dcp." in block:
            names["opt"].train()
        one_rank(monkeypatch)
    try:
        exec(compile(block, "page", "exec"), names)
    finally:
        if grouped:
            torch.distributed.destroy_process_group()


def test_names_exist_after_the_import():
    """``distruction.a.b`` anywhere on a page, after ``import distruction`` and nothing else."""
    found = {
        name
        for page in PAGES
        for name in re.findall(
            # The API page names places in the source, which the site's build resolves.
            r"(?<!::: )(?<![\w/`.-])`?(distruction(?:\.[A-Za-z_]\w*)+)(?![\w/]*\.(?:md|py|toml))",
            page.read_text(),
        )
    }
    found = sorted(n for n in found if not n.endswith((".kernels",)) and not re.search(r"\.(git|toml|whl)$", n))
    assert "distruction.planning.plan" in found
    assert "distruction.data.grouped" in found
    code = "import distruction\n" + "\n".join(found)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- command lines -------------------------------------------------------------------------------


def command_lines():
    """Each command of the shell blocks and of inline code with an option, its variables filled in."""
    given = {}
    for page in PAGES:
        shown = "\n".join(blocks(page, "", "sh", "bash", "console")).replace("\\\n", " ").splitlines()
        inline = re.findall(r"(?<!`)`((?:distruction|python) [^`]*--[^`]*)`(?!`)", page.read_text())
        for line in shown + inline:
            if variable := re.fullmatch(r'([A-Z]+)="(.*)"', line.strip()):
                given[variable[1]] = variable[2]
                continue
            words = shlex.split(string.Template(line).safe_substitute(given), comments=True)
            if words and words[0] in ("distruction", "python", "torchrun", "accelerate"):
                yield pytest.param(words, line in shown, id=f"{page.stem}-{' '.join(words)[:60]}")


class Parsed(Exception):
    """The command line is one."""


def parse_with_typer(command, words):
    command.make_context("command", words)
    raise Parsed


def parse_distruction(words, whole):
    group = typer.main.get_command(cli.app)
    if words[0] in ("--help",):
        raise Parsed
    command = group.commands[words[0]]
    if not whole:  # a sentence names the options that it is about
        for param in command.params:
            param.required = False
    parse_with_typer(command, words[1:])


@pytest.mark.parametrize(("words", "whole"), list(command_lines()))
def test_command_lines_are_parsed(monkeypatch, words, whole):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    if words[0] == "distruction":
        with pytest.raises(Parsed):
            parse_distruction(words[1:], whole)
        return
    where = next(i for i, w in enumerate(words) if w == "-m" or w.endswith(".py"))
    module = words[where] == "-m"
    target, rest = (words[where + 1], words[where + 2 :]) if module else (words[where], words[where + 1 :])
    if target == "distruction":
        with pytest.raises(Parsed):
            parse_distruction(rest, whole)
        return
    if module:
        assert importlib.util.find_spec(target) is not None
    else:
        assert (ROOT / target).is_file()
    if target.endswith("timm_train_bgd.py"):  # it hands its options to another script
        return
    script = ROOT / target
    if module:
        script = ROOT / target.replace(".", "/")
        script = script / "__main__.py" if script.is_dir() else script.with_suffix(".py")
    if "typer.run(main)" in script.read_text():

        def parse(main):
            app = typer.Typer()
            app.command()(main)
            parse_with_typer(typer.main.get_command(app), sys.argv[1:])

        monkeypatch.setattr(typer, "run", parse)
    else:
        real = argparse.ArgumentParser.parse_args

        def parse_args(self, *given):
            real(self, *given)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [target, *rest])
    with pytest.raises(Parsed):
        runpy.run_module(target, run_name="__main__") if module else runpy.run_path(
            str(ROOT / target), run_name="__main__"
        )


# --- links ---------------------------------------------------------------------------------------


def anchors(page):
    """What MkDocs and source browsers call the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


# --- the site ------------------------------------------------------------------------------------


def test_every_error_of_the_library_is_in_the_table_of_errors():
    """Counted by the words of the source, without its syntax tree."""
    sources = [p.read_text() for p in (ROOT / "distruction").rglob("*.py")]
    names = "|".join(mkdocs_errors.classes())
    made = sum(len(re.findall(rf"\braise (?:{names})\(", text)) for text in sources)
    found = list(mkdocs_errors.raised())
    warned = sum(len(re.findall(r"\bwarnings\.warn\(", text)) for text in sources)
    of_warnings = [entry for entry in found if entry[1].endswith("Warning")]
    assert len(of_warnings) == warned
    assert len(found) - warned >= made > 200
    assert {error for _, error, _ in found} >= {"UsageError", "PosteriorError", "NonFiniteError", "RankError"}
    assert "steps must be >= 1, not {steps}" in {message for _, _, message in found}
    messages = {message for _, _, message in found}
    assert "parameter {name} has the layout {layout}; make it dense with .to_dense()" in messages
    assert "{label} has no shape yet; run one batch through the model first" in messages
    assert "{top} holds no images" in messages
    bare = {m for m in messages if not re.search(r"[a-z]{3}", re.sub(r"{\w*}", "", m))}
    assert bare == {"{note}"}  # of what was left out of a data set, which the page on data lists
    table = mkdocs_errors.table()
    assert "steps must be \\>= 1, not {steps}" in table
    assert mkdocs_errors.MARK in (ROOT / "docs" / "troubleshooting.md").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1/std**2 = a * b", r"1/std\*\*2 = a \* b"),
        ("of ``a**2`` and `b*c`, d*e", r"of ``a**2`` and `b*c`, d\*e"),
        ("Take *args.\n\n>>> 2 ** 3\n8", "Take \\*args.\n\n>>> 2 ** 3\n8"),
    ],
)
def test_powers_in_docstrings_are_no_bold_type(text, shown):
    griffe = pytest.importorskip("mkdocs_griffe")
    assert griffe.escaped(text) == shown
