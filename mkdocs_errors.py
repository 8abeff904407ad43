"""The errors and warnings of the library, collected from where they are raised, as docs/troubleshooting.md's table."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
MARK = "<!-- errors -->"


def classes() -> dict[str, str]:
    """The library's errors and warnings and what each means, from the docstrings of distruction/errors.py."""
    tree = ast.parse((ROOT / "distruction" / "errors.py").read_text())
    return {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.ClassDef)}


def text_of(node: ast.expr) -> str:
    """The message that an expression makes, with what is only known at run time as its source in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        name = re.findall(r"[A-Za-z_]\w*", ast.unparse(node.value))
        return "{" + (name[-1] if name else "value") + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body) or text_of(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        parts = node.args[0].elts if isinstance(node.args[0], ast.Tuple) else []
        # What is spread into it, such as notes of what was not read, may be nothing.
        if own := [text_of(part) for part in parts if not isinstance(part, ast.Starred)]:
            return text_of(node.func.value).join(own)
    if isinstance(node, ast.BoolOp):
        return " or ".join(map(text_of, node.values))
    name = re.findall(r"[A-Za-z_]\w*", ast.unparse(node))
    return "{" + (name[0] if name else "message") + "}"


def raised() -> Iterator[tuple[str, str, str]]:
    """(file, error, message) of every place that makes one of the library's errors or warns."""
    known = classes()
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "distruction").rglob("*.py"))}
    functions = {
        node.name: [r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value is not None]
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    for path, tree in trees.items():
        reasons = _reasons(tree, functions)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := _kind(node)) in known and node.args:
                message = node.args[0]
                made_by = getattr(message.func, "id", "") if isinstance(message, ast.Call) else ""
                for each in functions.get(made_by, [message]):
                    text = text_of(each)
                    placed = next((r for r in reasons if f"{{{r}}}" in text), "")
                    for reason in reasons.get(placed, [f"{{{placed}}}"]):
                        yield str(path.relative_to(ROOT)), name, text.replace(f"{{{placed}}}", reason)


def _reasons(tree: ast.AST, functions: dict[str, list[ast.expr]]) -> dict[str, list[str]]:
    """What variables may say that ``if (variable := function(...))`` fills by a function which returns sentences."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.NamedExpr) and isinstance(node.value, ast.Call):
            returned = functions.get(getattr(node.value.func, "id", ""), [])
            sentences = [r for r in returned if isinstance(r, ast.JoinedStr) or isinstance(getattr(r, "value", 0), str)]
            if sentences and isinstance(node.target, ast.Name):
                found[node.target.id] = [text_of(r) for r in sentences]
    return found


def _kind(call: ast.Call) -> str:
    """The name of what is called, or of the category that ``warnings.warn`` is called with."""
    warned = isinstance(call.func, ast.Attribute) and call.func.attr == "warn" and len(call.args) > 1
    return getattr(call.args[1] if warned else call.func, "id", "")


def table() -> str:
    """A section for each error: what it means, then its messages with the remedy that each one names."""
    found = sorted(set(raised()), key=lambda entry: (entry[1], entry[2].lower()))
    lines = []
    for name, meaning in classes().items():
        rows = [(file, message) for file, error, message in found if error == name]
        if not rows:
            continue
        lines += [f"### {name}", "", meaning, "", "| message: the cause, then what helps | raised in |", "|---|---|"]
        for file, message in rows:
            # A pipe, an asterisk or an angle bracket of a message is itself.
            shown = re.sub(r"([|*<>_`\[\]\\])", r"\\\1", " ".join(message.split()))
            lines.append(f"| {shown} | `{file}` |")
        lines.append("")
    return "\n".join(lines)
