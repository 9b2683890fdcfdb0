"""The pages build without a warning, and a built page needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.docs.blocks import REPOSITORY


def test_the_documentation_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/concepts.html").read_text()
    assert page.count("<img ") == 7, "one picture for each concept"
    loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert not [address for address in loaded if "localhost" not in address]
