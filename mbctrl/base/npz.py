"""Files of numbers with a word about them: an .npz without pickles."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mbctrl.base.errors import SpecError
from mbctrl.base.files import write_whole


def write_arrays(path: str | Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays and what is to be known of them, in JSON's types; an earlier file stays until this one is whole.

    Errors:
        SpecError: where it cannot be written.
    """
    data = io.BytesIO()
    np.savez_compressed(data, about=np.array(json.dumps(about)), **arrays)
    write_whole(path, data.getvalue())


def read_arrays(path: str | Path, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a file of numbers says of itself, and its arrays by name; ``what`` it should be.

    Errors:
        SpecError: for a file that is none, and for numbers that are none.
    """
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
            about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise SpecError(f"is no {what}: {error}", file=path) from None
    if not isinstance(about, dict):
        raise SpecError(f"is no {what}", file=path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise SpecError(f"expected numbers, found {array.dtype}", file=path, key=name)
        if not np.isfinite(array).all():
            raise SpecError("holds numbers that are not finite", file=path, key=name)
    return about, arrays
