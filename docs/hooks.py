"""Put the pages at the root of the repository into the site, and turn links between files into links of pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite links: to a page of the site where the file is one, else to plain text, as the site has no code in it."""
    folder = "" if page.file.src_uri in PAGES.values() else "docs"

    def link(found: re.Match[str]) -> str:
        picture, text, target, fragment = found.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"{picture}[{text}]({PAGES[path]}{fragment or ''})"
        if path.startswith("docs/"):
            return f"{picture}[{text}]({path.removeprefix('docs/')}{fragment or ''})"
        return text

    return LINK.sub(link, markdown)
