"""What MkDocs does beside its own: pages of the repository outside docs/, and links that lead out of the site.

A link to a file of the repository that is no page becomes its text; one that leads nowhere ends the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository, and their pages on the site.
PAGES = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site needs them."""
    of_page = {site: source for source, site in PAGES.items()}
    source = of_page.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _CODE.split(markdown)  # code at odd places: a link's text may hold some, its brackets do not
    joined = "".join(part if number % 2 == 0 else f"\0{number}\0" for number, part in enumerate(parts))
    linked = _LINK.sub(lambda match: _link(match, source, page.file.src_uri), joined)
    return re.sub(r"\0(\d+)\0", lambda match: parts[int(match[1])], linked)


def _link(match: re.Match[str], source: str, page: str) -> str:
    image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
    if not target or ":" in target:
        return match[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if file in PAGES or file.startswith("docs/"):
        on_site = PAGES.get(file, file.removeprefix("docs/"))
        return f"{image}[{text}]({posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / file).exists():
        raise PluginError(f"{source}: {target} leads to no file")
    return text
