"""What a user of `zaya report` and `zaya top` can do wrong."""


class ReportError(Exception):
    """A folder that holds no run, or a page that cannot be written. The message says the remedy."""
