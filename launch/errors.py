"""The one exception of this package that users see. Standard library only."""


class LaunchError(RuntimeError):
    """A job cannot start, or its ranks cannot meet. The message is for the user: what, where, the value, the remedy."""
