"""Where robots, controllers, recipes and scenarios are found: $MBCTRL_PATH, then the wheel's copy, then the checkout."""

from __future__ import annotations

import os
from pathlib import Path

from mbctrl.base.errors import SpecError, suggest

FOLDERS = ("robots", "controllers", "calibration", "launch")
ENDINGS = {"parameters": "_fitted", "learning": "_learn"}
"""What the names of parameter files and of recipes of what is learnt end in; the others in calibration/ are recipes of fits."""


def roots() -> list[Path]:
    """Return the folders that hold ``robots/``, ``controllers/`` … in order of precedence."""
    package = Path(__file__).resolve().parents[1]
    user = [Path(entry).expanduser() for entry in os.environ.get("MBCTRL_PATH", "").split(os.pathsep) if entry]
    return [root for root in (*user, package / "share", package.parent) if root.is_dir()]


def names(folder: str) -> dict[str, Path]:
    """Return every entry of ``folder`` by name; earlier roots win.

    ``folder`` is one of FOLDERS, ``calibration`` then meaning its recipes of fits; ``parameters`` are the fitted parameters
    there, ``learning`` the recipes of what is learnt.
    """
    found: dict[str, Path] = {}
    place = "calibration" if folder in ENDINGS else folder
    for root in roots():
        pattern = "*/robot.yaml" if folder == "robots" else "*.yaml"
        for path in sorted((root / place).glob(pattern)):
            if place != "calibration" or _kind(path.stem) == folder:
                found.setdefault(path.parent.name if folder == "robots" else path.stem, path)
    return dict(sorted(found.items()))


def _kind(stem: str) -> str:
    """Return what a file of calibration/ is, by its name."""
    return next((kind for kind, ending in ENDINGS.items() if stem.endswith(ending)), "calibration")


def find(folder: str, name: str, *, file: str | Path | None = None, key: str | None = None) -> Path:
    """Return the file ``name`` stands for: a path as given, or an entry of ``folder`` by name.

    Args:
        folder: as ``names``.
        name: a path to a file, or the name of an entry.
        file, key: where the name was written, for the error.

    Errors:
        SpecError: naming what exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for root in roots():  # "launch/x.yaml" works from any folder
        if path.suffix and not path.is_absolute() and (root / path).is_file():
            return root / path
    known = names(folder)
    if name in known:
        return known[name]
    if path.suffix or os.sep in name:
        raise SpecError("no such file", file=file or name, key=None if file is None else f"{key}: {name}")
    what = {"parameters": "parameter file", "launch": "scenario", "calibration": "recipe", "learning": "recipe"}.get(
        folder, folder.rstrip("s")
    )
    raise SpecError(f"unknown {what} '{name}'{suggest(name, known)}", file=file, key=key)
