"""Compiled code on disk, found by its content's hash."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where compiled code is kept: $MBCTRL_CACHE, or the user's cache folder."""
    base = os.environ.get("MBCTRL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbctrl"


def read(path: Path) -> bytes | None:
    """Return cached code, or None where there is none or it is not whole."""
    try:
        digest, code = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def write(path: Path, code: bytes) -> None:
    """Keep code for the next time; a cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
        os.replace(temporary, path)
    except OSError as error:
        _log.info("compiled code is not kept: %s", error)
