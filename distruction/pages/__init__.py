"""Self-contained HTML pages: one frame (`base.html`) with its style in light and dark, and what goes into it."""

import base64
import html
import io
import re
from importlib import resources
from typing import Any

from ..extras import needed

with needed("experiments", "a report"):
    import jinja2
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

SCREEN_DPI = 96
"""A figure's pixels per inch on a page; files have twice as many."""
INK = "#0a0b0c"
"""What figures that become `svg` draw their text and axes in: the page's own colour of text takes its place."""

ACCENT = "#0a0b0d"
"""Likewise what becomes the page's colour of bars and curves."""


def render(name: str, **values: Any) -> str:
    """The page that a template of this package makes of ``values``."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda n: (resources.files(__package__) / n).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["rich"] = rich
    return environment.get_template(name).render(**values)


def rich(text: str) -> Markup:
    """A table's cell or a sentence as HTML: bold between ``**``, the sets' letters as indices."""
    bold = text.startswith("**") and text.endswith("**") and len(text) > 4
    inner = html.escape(text[2:-2] if bold else text)
    inner = inner.replace("D_r", "D<sub>r</sub>").replace("D_f", "D<sub>f</sub>")
    return Markup(f"<b>{inner}</b>" if bold else inner)


def png(figure: Figure) -> bytes:
    """The figure in `SCREEN_DPI` times two."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=2 * SCREEN_DPI, format="png")
    return picture.getvalue()


def embedded(picture: bytes, caption: str, width: int) -> Markup:
    """An image element with the PNG inside."""
    data = base64.b64encode(picture).decode()
    return Markup('<img alt="{}" width="{}" src="data:image/png;base64,{}">').format(caption, width, data)


def svg(figure: Figure, title: str) -> Markup:
    """The figure as an element of the page, in its font and, where it is drawn in `INK`, in its colour of text."""
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Groups are numbered in each figure anew, and a page has several.
    text = re.sub(r'<g id="[^"]*">', "<g>", drawn.getvalue())
    text = text.replace(INK, "currentColor").replace(ACCENT, "var(--bar)")
    return Markup(text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1))
