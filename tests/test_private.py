"""What the package uses of PyTorch's private names: no more than CONTRIBUTING.md lists, each with its reason."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "distruction").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
NAMES = re.compile(
    r"\btorch(?:\.\w+)*?\.(_[A-Za-z]\w*)"  # torch._foreach_add_, torch.utils._pytree
    r"|\bfrom torch[\w.]* import .*?\b(_[A-Za-z]\w*)"
    r"|\.(_version|_cdata|_buffers|_parameters|_modules|_spec|_local_tensor)\b"
)


def used():
    """Private names, the foreach functions as one."""
    found = set()
    for path in FILES:
        for match in NAMES.finditer(path.read_text()):
            name = next(filter(None, match.groups()))
            found.add("_foreach_*" if name.startswith("_foreach_") else name)
    return found | of_others()


def of_others():
    """Private attributes that the package reads or writes, by dot or by name, and defines nowhere: somebody else's."""
    own, named = {"_exit"}, set()  # os._exit is public in spite of its name
    for node in (n for path in FILES for n in ast.walk(ast.parse(path.read_text()))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                own.add(name)
            case ast.Attribute(attr=name):
                named.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                named.add(name)
    return {n for n in named - own if re.match("_(?!_|foreach_|distruction_)", n)}


def test_private_names_are_those_that_contributing_lists():
    section = re.search(
        r"## Private names of other libraries\n(.*?)(?:\n## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    rows = re.findall(r"^\| (`_.*?) \|", section[1], re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert used() == listed
