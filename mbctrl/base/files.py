"""Writing files so that nobody ever reads half of one."""

from __future__ import annotations

import os
from pathlib import Path

from mbctrl.base.errors import SpecError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` in one move: through a temporary file beside it, renamed when it is complete.

    Errors:
        SpecError: where the folder cannot be written to; an earlier file is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before what it names
        os.replace(temporary, path)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror or error}", file=path) from None
    finally:
        temporary.unlink(missing_ok=True)
