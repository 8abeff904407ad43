"""Links of a page to files outside of docs/: pictures come into the site, other files are named without a link."""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
# Hooks are loaded by path, with no folder of their own to import from.
sys.path.insert(0, str(ROOT))

import mkdocs_errors  # noqa: E402

LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config) -> Files:
    """Pictures under the path that they have in the repository."""
    for page in list(files.documentation_pages()):
        for picture, _, path in LINK.findall(page.content_string):
            if picture and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Pictures by their place in the site, other files by their path, and the table of the errors."""
    markdown = markdown.replace(mkdocs_errors.MARK, mkdocs_errors.table())
    return LINK.sub(lambda m: f"![{m[2]}]({m[3]})" if m[1] else m[2] if m[2].startswith("`") else f"`{m[3]}`", markdown)
