"""The errors that a caller's input can cause.

Every message says what was given, what was expected and what to do next. The
command line prints them without a traceback and exits with code 2.
"""

LONGEST_MESSAGE = 2000
_END = 300  # characters of a longer message that are kept of its end, which tells what to do


class SpQRError(ValueError):
    """Bad input. The call cannot be carried out.

    Every message can be printed: characters that could control a terminal are escaped, and a long message is cut.
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
    """A checkpoint is missing, damaged, edited or of another format version, or cannot be written."""


class ModelError(SpQRError):
    """The files or the configuration of a model do not describe a model that spqr-jax runs."""


class DataError(SpQRError):
    """Calibration or evaluation text is missing, empty or cannot be used."""


class NotFiniteError(SpQRError):
    """Weights or activations became infinite or NaN."""
