"""Atomicity: whenever the process is killed, readers see the old pair, the new pair, or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.index_file import bin_path, idx_path, read_index, sidecar_path
from megatron_zaya.data.prepare import prepare
from tests.data.conftest import write_texts


def killed_at(step: int, source: Path, prefix: Path, overwrite: bool) -> bool:
    """Run `prepare` in a forked child that SIGKILLs itself before its `step`-th rename or removal there."""
    child = os.fork()
    if child == 0:
        left = [step]

        def guarded(method):
            def run(self, *arguments, **options):
                if self.parent == prefix.parent and not self.name.endswith(".lock") and self.exists():
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return method(self, *arguments, **options)

            return run

        Path.replace, Path.unlink = guarded(Path.replace), guarded(Path.unlink)
        try:
            prepare([source], prefix, overwrite=overwrite)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_between_any_two_steps_of_the_commit(tmp_path: Path) -> None:
    import megatron.core.datasets.indexed_dataset  # noqa: F401 - once here, not in every child

    old, new = write_texts(tmp_path / "old", 3), write_texts(tmp_path / "new", 5, words="newer")
    for overwrite in (False, True):
        steps = 0
        while True:
            prefix = tmp_path / f"run-{overwrite}-{steps}" / "set"
            if overwrite:
                prepare([old], prefix)
                before = bin_path(prefix).read_bytes()
            steps += 1
            killed = killed_at(steps, new, prefix, overwrite)
            if idx_path(prefix).exists():
                documents = read_index(prefix).sequences
                assert documents == (3 if overwrite and killed else 5)
                if documents == 3:
                    assert bin_path(prefix).read_bytes() == before
            else:
                assert killed
            # The next run clears what was left; it needs no permission to overwrite where nothing is visible.
            prepare([new], prefix, overwrite=idx_path(prefix).exists() or overwrite)
            assert read_index(prefix).sequences == 5
            assert {p.name for p in prefix.parent.iterdir()} == {"set.bin", "set.idx", "set.json"}
            if not killed:
                break
        assert steps == (5 if overwrite else 4)


def test_killed_while_workers_write(tmp_path: Path) -> None:
    code = (
        "from megatron_zaya.data.prepare import prepare\n"
        f"prepare(['python-stdlib'] * 3, {str(tmp_path / 'set')!r}, workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    temporary = tmp_path / ".set.bin.tmp"
    while not (temporary.exists() and temporary.stat().st_size):
        assert process.poll() is None
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert not any(path(tmp_path / "set").exists() for path in (bin_path, idx_path, sidecar_path))
    deadline = time.monotonic() + 10
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    assert len(children) >= 2
    prepare([write_texts(tmp_path / "texts", 2)], tmp_path / "set")
    assert {p.name for p in tmp_path.iterdir()} == {"set.bin", "set.idx", "set.json", "texts"}


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 2)
    prefix = tmp_path / "set"
    prepare([texts], prefix)
    before = bin_path(prefix).read_bytes()
    with pytest.raises(DataError, match="the output is already there"):
        prepare([texts], prefix)
    assert bin_path(prefix).read_bytes() == before
    for name in ("own.bin", "own.json"):
        (tmp_path / name).write_text("the user's own")
        with pytest.raises(DataError, match=name):
            prepare([texts], tmp_path / "own")
        (tmp_path / name).unlink()


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    import numpy as np

    from megatron_zaya.data.output import PairWriter

    with (
        PairWriter(tmp_path / "set", np.uint16),
        pytest.raises(DataError, match="another process is writing"),
    ):
        prepare([write_texts(tmp_path / "texts", 2)], tmp_path / "set")
    assert {p.name for p in tmp_path.iterdir()} == {"texts"}
