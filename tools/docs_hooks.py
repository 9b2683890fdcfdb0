"""A hook of mkdocs: links from a page into the code become the name of the file, if the file exists.

In the repository such links are followed by editors and code hosts; the built pages hold the documentation only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replace links that leave the documentation; those that lead nowhere stay, and end a strict build."""
    docs = Path(config["docs_dir"]).resolve()
    here = docs / Path(page.file.src_path).parent

    def plain(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        outside = not target.is_relative_to(docs) or target.is_relative_to(docs / "adr")
        if not outside or not target.exists():
            return match[0]
        name = match[1].strip("`")
        path = target.relative_to(docs.parent)
        return f"`{path}`" if Path(name).name == path.name else f"{name} (`{path}`)"

    return _LINK.sub(plain, markdown)
