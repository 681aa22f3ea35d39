"""Seconds and bytes as people say them."""

from __future__ import annotations

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0


def about_seconds(seconds: float) -> str:
    """A duration, rounded: "a few seconds", "about 40 seconds", "about 3 minutes", "about 2 hours"."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 105:  # "1 minute" could be three quarters or one and a half
        return f"about {_rounded(seconds, 5 if seconds < 57.5 else 10)} seconds"
    if seconds < 57.5 * _MINUTE:
        minutes = seconds / _MINUTE
        return _counted(_rounded(minutes, 1 if minutes < 10 else 5), "minute")
    if seconds < 36 * _HOUR:
        return _counted(_rounded(seconds / _HOUR, 1), "hour")
    return _counted(_rounded(seconds / _DAY, 1), "day")


def _rounded(amount: float, step: int) -> int:
    return max(step, step * round(amount / step))


def _counted(amount: int, unit: str) -> str:
    return f"about {amount} {unit}{'s' * (amount != 1)}"


def about_bytes(count: float) -> str:
    """Bytes with two digits: "640 MB", "2.9 GB", "28 GB"."""
    if count < 0.995e9:
        return f"{max(10, 10 * round(count / 1e7))} MB"
    return f"{count / 1e9:.1f} GB" if count < 9.95e9 else f"{count / 1e9:.0f} GB"


def about_count(count: float) -> str:
    """Weights: "960", "85 thousand", "135 million", "7.2 billion"."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= 0.9995 * size:
            return f"{count / size:.1f} {word}" if count < 9.95 * size else f"{count / size:.0f} {word}"
    return str(round(count))


def short_duration(seconds: float) -> str:
    """A duration for a line that comes again and again: "40 s", "4 min", "2.5 h"."""
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{round(seconds / _MINUTE)} min" if seconds < 90 * _MINUTE else f"{seconds / _HOUR:.1f} h"
