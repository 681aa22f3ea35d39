"""The errors that a caller's input can cause.

Every message says what was given, what was expected and what to do next. The
command line prints them without a traceback and exits with code 2.
"""

LONGEST_MESSAGE = 2000
_END = 300  # characters of a longer message that are kept of its end, which tells what to do


class SpQRError(ValueError):
    """Bad input: the call cannot be carried out as it stands.

    Messages quote what stands in files. Whatever that is, they can be printed (characters
    that would steer a terminal, or are halves of one, are escaped) and are not endless.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_readable(str(message)))


def _readable(text: str) -> str:
    if len(text) > LONGEST_MESSAGE:
        begin = LONGEST_MESSAGE - _END - 100
        text = f"{text[:begin]} ... [{len(text) - begin - _END} characters] ... {text[-_END:]}"
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)[:LONGEST_MESSAGE]


class CheckpointError(SpQRError):
    """A checkpoint is missing, damaged, edited or of another format version."""


class ModelError(SpQRError):
    """A model's files or configuration do not describe a model we can run."""


class DataError(SpQRError):
    """Calibration or evaluation text is missing, empty or unusable."""


class NotFiniteError(SpQRError):
    """A result is no number: infinities or NaN arose in weights or activations."""
