"""What the package uses of PyTorch's private names: no more than CONTRIBUTING.md lists, each with its reason."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = re.compile(
    r"\btorch(?:\.\w+)*?\.(_[A-Za-z]\w*)"  # torch._foreach_add_, torch.utils._pytree
    r"|\bfrom torch[\w.]* import .*?\b(_[A-Za-z]\w*)"
    r"|\.(_version|_cdata|_buffers|_parameters|_modules|_spec|_local_tensor)\b"
)


def used():
    """Private names, the foreach functions as one."""
    found = set()
    for path in [*(ROOT / "distruction").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for match in NAMES.finditer(path.read_text()):
            name = next(filter(None, match.groups()))
            found.add("_foreach_*" if name.startswith("_foreach_") else name)
    return found


def test_private_names_are_those_that_contributing_lists():
    section = re.search(
        r"## Private names of PyTorch\n(.*?)(?:\n## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    rows = re.findall(r"^\| (`_.*?) \|", section[1], re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert used() == listed
