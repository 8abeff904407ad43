"""Docstrings as Markdown: `**` is a power in their formulas, not the mark of bold type."""

import re

import griffe

CODE = re.compile(r"``.*?``|`[^`]*`|^\s*>>>.*$", re.DOTALL | re.MULTILINE)


def escaped(text: str) -> str:
    """The text with every asterisk outside of code escaped."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [text[end : code.start()].replace("*", r"\*"), code[0]]
        end = code.end()
    return "".join(parts) + text[end:].replace("*", r"\*")


class Formulas(griffe.Extension):
    """Escapes the docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)
