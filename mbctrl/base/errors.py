"""Typed errors that say, in one line, where, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class MbctrlError(Exception):
    """Base of every error a user can cause; the command line prints it in one line and exits with 2.

    Args:
        message: what was found and what was expected.
        file: the file at fault, if there is one.
        key: the key, joint or column at fault, dotted from the file's root.
    """

    exit_code = 2

    def __init__(self, message: str, *, file: str | Path | None = None, key: str | None = None) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.key = key
        super().__init__(message)

    def __str__(self) -> str:
        where = [part for part in (self.file, self.key) if part]
        return ": ".join([*where, " ".join(self.message.split())])

    def __reduce__(self):  # keyword-only fields must survive the trip from a planner process
        return _rebuild, (type(self), self.message, self.file, self.key)


def _rebuild(kind: type[MbctrlError], message: str, file: str | None, key: str | None) -> MbctrlError:
    return kind(message, file=file, key=key)


class SpecError(MbctrlError):
    """A YAML file that is missing, unreadable or does not fit its schema."""


class ModelError(MbctrlError):
    """A robot model that does not compile, is not supported or fails its self-check."""


class GoalError(MbctrlError):
    """A goal the robot cannot meet, such as a target out of reach."""


class ExtraError(MbctrlError):
    """An optional dependency that is not installed."""


class BundleError(MbctrlError):
    """An exported planner that is not whole, of another version, for another robot, or not what it says it is."""


class DriverError(MbctrlError):
    """A robot driver that cannot be opened or has stopped answering."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? known: a, b"`` for an unknown ``name``."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint or ';'} known: {', '.join(known) or 'none'}"
