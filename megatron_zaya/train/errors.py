"""The error of a training run that cannot go on. Torch-free."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message is for the user."""
