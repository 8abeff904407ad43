"""The core without the packages of the extras: each part says which extra it needs, and the rest works."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distruction.errors import MissingPackage
from distruction.extras import needed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "ivon-opt": "ivon", "pyyaml": "yaml"}
"""Packages whose module has another name."""
OPTIONAL = {
    MODULES.get(name, name)
    for extra in ("vision", "cli", "experiments", "language", "receipt", "parquet", "datasets", "tensorboard", "wandb")
    for line in EXTRAS[extra]
    if (name := re.match(r"[\w-]+", line)[0]) != "distruction"
}

BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(code, blocked=OPTIONAL, *args):
    """Run code in a process that cannot import the packages of the extras; torch needs some of them itself."""
    # Jinja and filelock come with torch.
    blocked = set(blocked) - {"jinja2", "markupsafe", "filelock"}
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + code, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def installs(extra):
    """The modules that an extra brings, those of the extras within it too."""
    found = set(PROJECT["dependencies"])
    for line in EXTRAS[extra]:
        if inner := re.fullmatch(r"distruction\[(.*)\]", line):
            for other in inner[1].split(","):
                found |= installs(other)
        else:
            found.add(line)
    return {MODULES.get(n, n) for n in (re.match(r"[\w-]+", line)[0] for line in found)}


def test_the_core_prepares_and_forgets_and_the_other_parts_name_their_extra(tmp_path):
    code = """
import importlib, runpy, torch, distruction
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
posterior = distruction.prepare(model, torch.utils.data.DataLoader(data, 12), steps=3)
posterior.save(sys.argv[1])
posterior = distruction.Posterior.load(sys.argv[1])
forget = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(0, 24, 3)), 4)
report = distruction.forget(model, posterior, forget, kl_weight=0.1, steps=3)
print(len(report.history))
for name in ("models", "data", "metrics", "methods", "planning", "report", "experiments", "cli"):
    try:
        importlib.import_module("distruction." + name)
    except distruction.errors.MissingPackage as error:
        print(error)
sys.argv[1:] = ["doctor"]
runpy.run_module("distruction", run_name="__main__")
"""
    done = python(code, OPTIONAL, str(tmp_path / "posterior.safetensors"))
    assert done.returncode == 0, done.stderr
    steps, *lines = done.stdout.splitlines()
    assert steps == "3"
    for line, (package, extra) in zip(
        lines,
        [("timm", "vision"), ("PIL", "vision"), ("PIL", "vision"), ("PIL", "vision"), ("timm", "vision"),
         ("PIL", "vision"), ("PIL", "vision"), ("typer", "cli")],
        strict=False,
    ):  # fmt: skip
        what = "the command line" if package == "typer" else "this part of distruction"
        expected = f"{what} needs {package}, which is not installed: pip install 'distruction[{extra}]'"
        assert line == expected
    assert [line for line in lines if line.startswith("cpu: ")]


def test_a_mistake_in_the_library_is_not_called_a_missing_package():
    with pytest.raises(ModuleNotFoundError, match=r"'distruction\.no_such_module'") as error, needed("cli"):
        importlib.import_module("distruction.no_such_module")
    assert not isinstance(error.value, MissingPackage)


def test_the_command_line_without_its_packages_is_one_line():
    code = "import runpy; sys.argv[1:] = ['forget']; runpy.run_module('distruction', run_name='__main__')"
    done = python(code)
    assert done.returncode == 2
    said = "the command line needs typer, which is not installed: pip install 'distruction[cli]'"
    assert done.stderr == f"error: {said}\n"


def test_the_help_needs_no_more_than_the_extra_cli():
    code = "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('distruction', run_name='__main__')"
    done = python(code, OPTIONAL - installs("cli"))
    assert done.returncode == 0, done.stderr
    assert "forget" in done.stdout


def imports(path):
    """(module, extra that guards it or None) of every import of a file that runs, outside of TYPE_CHECKING."""

    def visit(node, extra):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.With):
            call = node.items[0].context_expr
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "needed":
                extra = call.args[0].value
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], extra) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0], extra
        for child in ast.iter_child_nodes(node):
            yield from visit(child, extra)

    yield from visit(ast.parse(path.read_text()), None)


CORE = {"torch", "numpy", "safetensors"}


def test_each_import_is_of_the_core_or_says_its_extra():
    for path in sorted((ROOT / "distruction").rglob("*.py")):
        in_cli = path.parent.name == "cli"
        for module, extra in imports(path):
            if module in sys.stdlib_module_names | CORE or (path.name == "progress.py" and module == "rich"):
                continue
            # The package distruction.cli has the guard of its modules.
            extra = "cli" if in_cli else extra
            assert extra is not None, f"{path}: {module} is imported outside of `with needed(...)`"
            assert module in installs(extra), f"{path}: the extra {extra} does not bring {module}"


def test_every_package_is_in_the_wheel():
    """setuptools takes what is named; a new folder that is not would be missing from the wheel alone."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "distruction").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {".".join(folder.parts) for folder in folders} | {"distruction.kernels"}
