"""An exported planner on disk: a folder whose every byte is accounted for, checked before any of it is used.

One flipped bit in an ONNX file loads and answers silently wrong nine times in ten, so nothing is read that its SHA-256 in
``manifest.json`` does not vouch for, and ``manifest.sha256`` vouches for the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import BundleError, MbctrlError
from mbctrl.base.robot import Robot
from mbctrl.base.spec import parse_yaml, validate

FORMAT = 1
"""The manifest's version; another one is refused: what a field means may have changed."""
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
ROBOT, ROLLOUT, WEIGHTS, GOLDEN, POLICY = "robot.yaml", "rollout.json", "residual.f32", "golden.npz", "policy.onnx"


def digest(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    ``files`` are the contents by name; ``manifest`` the manifest's data; ``seal`` the manifest's SHA-256, which names the bundle;
    ``robot`` the arm it was made for; ``config`` the resolved run it was exported from.
    """

    folder: Path
    manifest: dict[str, Any]
    seal: str
    files: dict[str, bytes]
    robot: Robot
    config: RunConfig

    def rollout(self) -> dict[str, Any]:
        """Return the traced programs' data."""
        return json.loads(self.files[ROLLOUT])

    def weights(self) -> np.ndarray | None:
        """Return the numbers of the residual's networks, None where there are none."""
        return np.frombuffer(self.files[WEIGHTS], "<f4") if WEIGHTS in self.files else None

    def golden(self) -> dict[str, np.ndarray]:
        """Return the golden vectors by name; the first index counts the cases."""
        with np.load(io.BytesIO(self.files[GOLDEN]), allow_pickle=False) as data:
            return dict(data)


def fingerprint(robot: Robot, model_hash: str) -> dict[str, Any]:
    """Return what makes a robot that robot: names, joint order, limits, how it takes commands, its model's hash."""
    limits = {key: None if value is None else list(value) for key, value in robot.limits.model_dump().items()}
    control = robot.control.model_dump(mode="json")
    return {"name": robot.name, "joints": list(robot.joints), "actuated": list(robot.driven), "tool": robot.tool} | {
        "limits": limits,
        "control": control,
        "model": model_hash,
    }


def load_bundle(path: str | Path) -> Bundle:
    """Load and check a bundle.

    Errors:
        BundleError: naming the file at fault, what was found and what was expected.
    """
    try:
        return _loaded(Path(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # sealed, and not by mbctrl
        raise BundleError(f"is no manifest: {type(error).__name__} {error}", file=Path(path) / MANIFEST) from None


def _loaded(folder: Path) -> Bundle:
    if not folder.is_dir():
        raise BundleError("no such folder; mbctrl export makes one", file=folder)
    text, seal = _read(folder, MANIFEST), _read(folder, SEAL)
    if seal != digest(text).encode() + b"\n":
        raise BundleError("does not match its seal: changed or damaged; export again", file=folder / MANIFEST)
    try:
        manifest = json.loads(text)
        version, listed = manifest["format"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"is no manifest: {error}", file=folder / MANIFEST) from None
    if version != FORMAT:
        made = manifest.get("versions", {}).get("mbctrl", "unknown")
        raise BundleError(
            f"format {version!r} of mbctrl {made}, this one reads format {FORMAT}; export again",
            file=folder / MANIFEST,
            key="format",
        )
    files = {}
    for name, expected in listed.items():
        files[name] = _read(folder, name)
        found = digest(files[name])
        if found != expected:
            raise BundleError(f"SHA-256 {found[:12]}…, expected {expected[:12]}…: changed or damaged", file=folder / name)
    for name in (ROBOT, ROLLOUT, GOLDEN):
        if name not in files:
            raise BundleError("missing", file=folder / MANIFEST, key=f"files.{name}")
    place = folder / ROBOT
    try:
        robot = validate(Robot, {**parse_yaml(files[ROBOT].decode(), place), "path": place}, place)
        config = validate(RunConfig, manifest["config"], folder / MANIFEST)
    except (MbctrlError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BundleError(str(error), file=folder) from None
    if fingerprint(robot, manifest["robot"]["model"]) != manifest["robot"]:
        raise BundleError("is not the robot of the manifest", file=place)
    return Bundle(folder, manifest, digest(text), files, robot, config)


def check_robot(bundle: Bundle, robot: Robot) -> None:
    """Refuse another robot than the bundle was made for.

    Errors:
        BundleError: naming the first thing that differs.
    """
    ours, theirs = bundle.manifest["robot"], fingerprint(robot, bundle.manifest["robot"]["model"])
    for key in ours:
        if ours[key] == theirs[key]:
            continue
        if key in ("limits", "control"):
            part = next(name for name in ours[key] if ours[key][name] != theirs[key].get(name))
            raise BundleError(
                f"made for {ours[key][part]}, the robot has {theirs[key].get(part)}", file=bundle.folder, key=f"{key}.{part}"
            )
        raise BundleError(f"made for {ours[key]}, the robot has {theirs[key]}", file=bundle.folder, key=f"robot.{key}")


def _read(folder: Path, name: str) -> bytes:
    if Path(name).name != name:
        raise BundleError("expected a file of the bundle's own folder", file=folder, key=name)
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror or error}", file=folder / name) from None
