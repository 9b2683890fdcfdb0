"""The one exception that users see: what is wrong, where, the value, and the remedy.

Invariant: everything the command line reports as a user error is a `TopologyError`; anything else is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations


class TopologyError(Exception):
    """A problem in the user's input, with its place and the way out.

    Args:
        what: the problem, as a sentence without the final full stop.
        where: file (and line), option or host in which it was found.
        value: the offending value as the user wrote it; None where there is none.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", value: object = None, remedy: str = "") -> None:
        self.what, self.where, self.value, self.remedy = what, where, value, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message on one line."""
        head = f"{self.where}: " if self.where else ""
        seen = f" (got {self.value!r})" if self.value is not None else ""
        tail = f". Remedy: {self.remedy}" if self.remedy else ""
        return f"{head}{self.what}{seen}{tail}"
