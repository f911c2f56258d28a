"""Transitions: what a robot's state became one model step after a command; in memory, and in Parquet files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbctrl.base.errors import MbctrlError
from mbctrl.base.files import write_whole

FORMAT = 1
"""Version of the file's layout."""


class TransitionError(MbctrlError):
    """Transitions that cannot be read, are of different robots, or hold what is no number; with file and row."""


@dataclass(frozen=True)
class Source:
    """Whose transitions these are: joints in order, those that turn, those that take commands, what a command is (``rad``, a
    reference, or ``N·m``), and the time between two states ``dt`` [s]."""

    robot: str
    joints: tuple[str, ...]
    revolute: tuple[bool, ...]
    driven: tuple[str, ...]
    command: str
    dt: float

    def columns(self) -> dict[str, str]:
        """Return the columns of states and commands, in order, with their units."""
        turning = dict(zip(self.joints, self.revolute))
        place = {joint: "rad" if turning[joint] else "m" for joint in self.joints}
        force = {joint: "N·m" if turning[joint] else "N" for joint in self.joints}
        command = place if self.command == "rad" else force
        return {
            **{f"q_{joint}": place[joint] for joint in self.joints},
            **{f"v_{joint}": f"{place[joint]}/s" for joint in self.joints},
            **{f"u_{joint}": command[joint] for joint in self.driven},
            **{f"next_q_{joint}": place[joint] for joint in self.joints},
            **{f"next_v_{joint}": f"{place[joint]}/s" for joint in self.joints},
        }


@dataclass(frozen=True)
class Transitions:
    """T transitions of one robot, in the order they happened within an episode.

    Args:
        source: whose they are.
        x, x_next: (T, nx) states [q, v] and those ``source.dt`` later.
        u: (T, nu) the command in between: the mean of torques, the last of references that moved.
        contact: (T,) whether the tool touched something in between.
        gap: (T,) distance [m] of the tool from what it may touch, before; NaN: unknown.
        episode: (T,) which stretch of time a transition is of.
        t: (T,) when it began [s].
        file, row: (T,) where it was read: an index into ``files``, and the row counted from 1.
        files: names.
    """

    source: Source
    x: np.ndarray
    u: np.ndarray
    x_next: np.ndarray
    contact: np.ndarray
    gap: np.ndarray
    episode: np.ndarray
    t: np.ndarray
    file: np.ndarray
    row: np.ndarray
    files: tuple[str, ...] = ("memory",)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray) -> Transitions:
        """Return some of them: a mask (T,) or indices."""
        rows = {part.name: getattr(self, part.name)[index] for part in fields(self) if part.name not in ("source", "files")}
        return replace(self, **rows)

    def where(self, index: int) -> tuple[str, int]:
        """Return the file and the row, from 1, that one was read from."""
        return self.files[int(self.file[index])], int(self.row[index])

    def impacts(self) -> np.ndarray:
        """Return (T,) whether contact began or ended with a transition: it differs from the one before."""
        changed = np.zeros(len(self), bool)
        changed[1:] = (self.contact[1:] != self.contact[:-1]) & self.follows()[1:]
        return changed

    def follows(self) -> np.ndarray:
        """Return (T,) whether a transition begins where and when the one before it ended."""
        joined = np.zeros(len(self), bool)
        late = np.abs(np.diff(self.t) - self.source.dt) > 0.1 * self.source.dt
        joined[1:] = ~late & (self.episode[1:] == self.episode[:-1])
        return joined


def made(source: Source, x: np.ndarray, u: np.ndarray, x_next: np.ndarray, **known: Any) -> Transitions:
    """Return transitions with what is not known filled in: no contact, gaps unknown, one episode, times in a row, row numbers.

    Errors:
        TransitionError: for numbers that are none, with the row.
    """
    count = len(x)
    parts: dict[str, Any] = {
        "contact": np.zeros(count, bool),
        "gap": np.full(count, np.nan),
        "episode": np.zeros(count, int),
        "t": source.dt * np.arange(count),
        "file": np.zeros(count, int),
        "row": np.arange(1, count + 1),
    }
    found = Transitions(source, np.asarray(x, float), np.asarray(u, float), np.asarray(x_next, float), **{**parts, **known})
    names = list(source.columns())
    check_finite(found, np.hstack([found.x, found.u, found.x_next]), names)
    return found


def check_finite(transitions: Transitions, values: np.ndarray, names: Sequence[str]) -> None:
    """Refuse ``values`` (T, columns) that are no numbers, by the file, row and column of the first."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        file, row = transitions.where(int(bad[0, 0]))
        raise TransitionError(f"{names[bad[0, 1]]} is {values[tuple(bad[0])]}", file=file, key=f"row {row}")


def concatenate(parts: Sequence[Transitions]) -> Transitions:
    """Return all of them; episodes are numbered anew.

    Errors:
        TransitionError: for different robots, joints or time steps.
    """
    first = parts[0]
    episode = file = 0
    numbered: list[Transitions] = []
    for part in parts:
        for key, one in vars(part.source).items():
            wanted = getattr(first.source, key)
            same = abs(one - wanted) < 1e-9 if key == "dt" else one == wanted
            if not same:
                raise TransitionError(f"expected {wanted} as in {first.files[0]}, found {one}", file=part.files[0], key=key)
        _, own = np.unique(part.episode, return_inverse=True)
        numbered.append(replace(part, episode=own + episode, file=part.file + file))
        episode, file = episode + int(own.max(initial=-1)) + 1, file + len(part.files)
    rows = [part.name for part in fields(Transitions) if part.name not in ("source", "files")]
    joined = {name: np.concatenate([getattr(part, name) for part in numbered]) for name in rows}
    return Transitions(first.source, **joined, files=tuple(name for part in parts for name in part.files))


def cut(transitions: Transitions, length: float) -> Transitions:
    """Return the same with episodes no longer than ``length`` [s]: pieces of a long run that are held out one by one."""
    _, own = np.unique(transitions.episode, return_inverse=True)
    begin = np.full(int(own.max(initial=0)) + 1, np.inf)
    np.minimum.at(begin, own, transitions.t)
    piece = np.floor((transitions.t - begin[own]) / length + 1e-6).astype(int)
    _, episode = np.unique(np.stack([own, piece], 1), axis=0, return_inverse=True)
    return replace(transitions, episode=episode.reshape(-1))


def split(transitions: Transitions, shares: tuple[float, float], seed: int) -> Iterator[Transitions]:
    """Yield training, validation and test transitions; whole episodes, drawn by ``seed``, with contact and without in like shares.

    Args:
        shares: of the episodes that go to validation and test; at least one each, and none for a share of 0.

    Errors:
        TransitionError: where there are too few episodes.
    """
    episodes = np.unique(transitions.episode)
    counts = [max(1, round(share * len(episodes))) if share > 0 else 0 for share in shares]
    if sum(counts) >= len(episodes):
        raise TransitionError(
            f"expected at least {sum(share > 0 for share in shares) + 1} episodes to hold some out, found {len(episodes)}; "
            "more logs, or a shorter 'episode' in the recipe",
            file=transitions.files[0],
        )
    order = np.random.default_rng(seed).permutation(episodes)
    touching = np.isin(order, transitions.episode[transitions.contact])
    place = np.empty(len(order))  # in its own group, from 0 to 1
    for group in (touching, ~touching):
        place[group] = np.arange(group.sum()) / max(1, group.sum())
    order = order[np.lexsort((~touching, place))]  # of the first few, some touch
    held = np.cumsum([0, *counts])
    for chosen in (order[held[2] :], order[: held[1]], order[held[1] : held[2]]):
        yield transitions.take(np.isin(transitions.episode, chosen))


def write_transitions(path: str | Path, transitions: Transitions) -> None:
    """Write a Parquet file, whole or not at all."""
    names = transitions.source.columns()
    values = np.hstack([transitions.x, transitions.u, transitions.x_next])
    table = {name: values[:, k] for k, name in enumerate(names)}
    rest = {name: getattr(transitions, name) for name in ("contact", "gap", "episode", "t")}
    about = {"format": FORMAT, **vars(transitions.source), "units": {**names, "gap": "m", "t": "s"}}
    made_of = pa.table({**table, **rest}).replace_schema_metadata({"mbctrl": json.dumps(about)})
    data = io.BytesIO()
    pq.write_table(made_of, data, compression="zstd")
    write_whole(path, data.getvalue())


def read_transitions(path: str | Path) -> Transitions:
    """Read a Parquet file of ``write_transitions``.

    Errors:
        TransitionError: for a file that is none, of another format, lacks columns or holds what is no number.
    """
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"mbctrl"])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        reason = "no metadata of mbctrl" if isinstance(error, KeyError) else str(error).split("\n", 1)[0]
        raise TransitionError(f"is no file of transitions: {reason}", file=path) from None
    if about.get("format") != FORMAT:
        raise TransitionError(f"expected format {FORMAT}, found {about.get('format')}", file=path, key="format")
    listed = {key: tuple(about[key]) for key in ("joints", "revolute", "driven")}
    source = Source(**{**{key: about[key] for key in ("robot", "command", "dt")}, **listed})
    names = list(source.columns())
    missing = [name for name in (*names, "contact", "gap", "episode", "t") if name not in table.column_names]
    if missing:
        raise TransitionError("no such column", file=path, key=missing[0])
    data = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    values = np.stack([data[name] for name in names], 1)
    nx, nu = 2 * len(source.joints), len(source.driven)
    known = {"contact": data["contact"].astype(bool), "gap": data["gap"].astype(float), "episode": data["episode"].astype(int)}
    return made(source, *np.split(values, [nx, nx + nu], 1), **known, t=data["t"], files=(str(path),))
