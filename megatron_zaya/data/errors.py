"""The one error of the data side, addressed to the user: what is wrong, where, the value seen, the remedy."""

from __future__ import annotations

from typing import Any


class DataError(ValueError):
    """Input data, or a request for data, that cannot be served as it is.

    `what` says what is wrong in one clause, `where` names the key, the file or the file and line, `value` is
    what was found there and `remedy` is what the user can do about it. `str()` gives all of them as one
    short message.
    """

    def __init__(self, what: str, *, where: Any = None, value: Any = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.value = value
        self.remedy = remedy
        super().__init__(self._message())

    def _message(self) -> str:
        message = self.what
        if self.where is not None:
            message = f"{self.where}: {message}"
        if self.value is not None:
            message += f" (found {_short(self.value)})"
        return f"{message}. {self.remedy}" if self.remedy else message

    def fields(self) -> dict[str, Any]:
        """The constructor's arguments as plain values: how an error crosses a process boundary."""
        value = None if self.value is None else str(self.value)
        return {"what": self.what, "where": self.where, "value": value, "remedy": self.remedy}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> DataError:
        """The error that `fields` came from."""
        arguments = dict(fields)
        return cls(arguments.pop("what"), **arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return (DataError.from_fields, (self.fields(),))


def _short(value: Any, limit: int = 120) -> str:
    """`value` for a message: a line of text at most `limit` characters long."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split()) or "nothing"
    return text if len(text) <= limit else text[: limit - 3] + "..."
