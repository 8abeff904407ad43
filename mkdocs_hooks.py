"""Links of a page to files outside of docs/: pictures come into the site, other files are named without a link."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config) -> Files:
    """Pictures under the path that they have in the repository."""
    for page in list(files.documentation_pages()):
        for picture, _, path in LINK.findall(page.content_string):
            if picture and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Pictures by their place in the site, and other files by their path."""
    return LINK.sub(lambda m: f"![{m[2]}]({m[3]})" if m[1] else m[2] if m[2].startswith("`") else f"`{m[3]}`", markdown)
