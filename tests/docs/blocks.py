"""The code blocks of a page. A shell block is executed, unless a comment right before it says why not:

<!-- not run: REASON; covered by PATH, PATH -->
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHELL = ("sh", "console")
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^>]*?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_WHY = re.compile(r"(?P<reason>.+); covered by (?P<paths>[\w./, -]+)", re.S)


@dataclass(frozen=True)
class Block:
    """One shell block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    """Why it is not executed; empty: it is."""
    covered_by: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return its commands as words, without comments and prompts; pipes and the like end a command."""
        text = self.text.replace("\\\n", " ")
        if self.language == "console":
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        found = []
        for line in text.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;><")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word[0] in "|&;><":
                    found += [words] if words else []
                    words = []
                else:
                    words.append(word)
        return found


def shell_blocks(page: str) -> list[Block]:
    """Return the shell blocks of a page of the repository."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = []
    for match in _BLOCK.finditer(text):
        if match["language"] in SHELL:
            line = text.count("\n", 0, match.start("text"))
            reason, paths = "", ()
            if match["why"] is not None:
                why = _WHY.fullmatch(match["why"].replace("\n", " "))
                assert why, f"{page}:{line}: write <!-- not run: REASON; covered by PATH -->"
                reason, paths = why["reason"], tuple(path.strip() for path in why["paths"].split(","))
            blocks.append(Block(page, line, match["language"], match["text"], reason, paths))
    return blocks
