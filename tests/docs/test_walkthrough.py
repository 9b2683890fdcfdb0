"""README and tutorial: every shell block is executed, or says why not and what covers it."""

from __future__ import annotations

from tests.docs.blocks import REPOSITORY, shell_blocks

PAGES = ("README.md", "docs/tutorial.md")


def test_every_block_that_is_not_run_says_why_and_what_covers_it():
    for page in PAGES:
        for block in shell_blocks(page):
            assert block.language == "sh", f"{block.name}: what is executed is marked sh"
            assert not block.reason or block.covered_by, block.name
            assert all((REPOSITORY / path).exists() for path in block.covered_by), block.name
