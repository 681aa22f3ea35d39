"""The errors that a caller's input can cause.

Every message says what was given, what was expected and what to do next. The
command line prints them without a traceback and exits with code 2.
"""


class SpQRError(ValueError):
    """Bad input: the call cannot be carried out as it stands."""


class CheckpointError(SpQRError):
    """A checkpoint is missing, damaged, edited or of another format version."""


class ModelError(SpQRError):
    """A model's files or configuration do not describe a model we can run."""


class DataError(SpQRError):
    """Calibration or evaluation text is missing, empty or unusable."""


class NotFiniteError(SpQRError):
    """A result is no number: infinities or NaN arose in weights or activations."""
