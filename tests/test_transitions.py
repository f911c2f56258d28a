"""Transitions: on disk and back, put together, cut, held out by episode, and from the log of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from peg import DT, peg, plays

from mbctrl.base.logs import LogError, LogWriter, read_log
from mbctrl.base.robot import load_robot
from mbctrl.dynamics.load import Model
from mbctrl.learning.runs import from_run, read_all, source_of
from mbctrl.learning.transitions import (
    TransitionError,
    Transitions,
    concatenate,
    cut,
    made,
    read_transitions,
    split,
    write_transitions,
)

ARRAYS = ("x", "u", "x_next", "contact", "gap", "episode", "t", "row")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return peg(tmp_path_factory.mktemp("peg"))


@pytest.fixture(scope="module")
def some(model: Model) -> Transitions:
    return plays(model, 6, seconds=1.0)


def test_a_file_holds_all_of_it_with_units(some: Transitions, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    known = replace(some, gap=np.where(some.episode > 0, some.x[:, 0] - 0.01, np.nan), row=np.arange(1, len(some) + 1))
    write_transitions(path, known)
    back = read_transitions(path)
    assert back.source == some.source and back.files == (str(path),) and set(back.episode) == set(range(6))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(back, name), getattr(known, name), err_msg=name)
    metadata = pq.read_schema(path).metadata[b"mbctrl"].decode()
    for text in ('"q_z": "m"', '"v_z": "m/s"', '"u_z": "N"', '"dt": 0.02', '"robot": "peg"'):
        assert text in metadata
    assert back.contact.any() and back.impacts().sum() > 5


def test_together_episodes_are_numbered_anew_and_strangers_refused(some: Transitions) -> None:
    both = concatenate([replace(some, files=("one",)), replace(some, files=("two",))])
    assert len(np.unique(both.episode)) == 12 and both.where(len(some)) == ("two", int(some.row[0]))
    for change in ({"dt": 0.01}, {"robot": "hammer"}, {"joints": ("y",)}, {"command": "rad"}):
        other = replace(some, source=replace(some.source, **change), files=("other",))
        with pytest.raises(TransitionError, match=rf"other: {next(iter(change))}: expected .* as in one, found"):
            concatenate([replace(some, files=("one",)), other])


def test_what_is_no_number_is_refused_by_file_row_and_column(some: Transitions, tmp_path: Path) -> None:
    bad = some.x_next.copy()
    bad[16, 1] = np.nan
    path = tmp_path / "bad.parquet"
    write_transitions(path, replace(some, x_next=bad))
    with pytest.raises(TransitionError, match=r"bad.parquet: row 17: next_v_z is nan"):
        read_transitions(path)


@pytest.mark.parametrize("what", ["text", "empty", "foreign", "newer", "narrow"])
def test_no_file_of_transitions_is_one_line(some: Transitions, tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.parquet"
    if what in ("text", "empty"):
        path.write_text("no parquet" if what == "text" else "")
    else:
        write_transitions(path, some)
        table = pq.read_table(path)
        if what == "foreign":
            table = table.replace_schema_metadata({})
        elif what == "newer":
            about = table.schema.metadata[b"mbctrl"].replace(b'"format": 1', b'"format": 2')
            table = table.replace_schema_metadata({"mbctrl": about})
        else:
            table = table.drop_columns(["contact"])
        pq.write_table(table, path)
    expected = {"newer": "x.parquet: format: expected format 1, found 2", "narrow": "x.parquet: contact: no such column"}
    with pytest.raises(TransitionError, match=expected.get(what, "x.parquet: is no file of transitions")) as caught:
        read_transitions(path)
    assert "\n" not in str(caught.value)


def test_whole_episodes_are_held_out_by_seed(some: Transitions) -> None:
    parts = list(split(some, (0.2, 0.2), seed=3))
    sets = [set(part.episode) for part in parts]
    assert [len(one) for one in sets] == [4, 1, 1] and set.union(*sets) == set(range(6)) and sum(map(len, parts)) == len(some)
    again = [set(part.episode) for part in split(some, (0.2, 0.2), seed=3)]
    assert again == sets and any([set(p.episode) for p in split(some, (0.2, 0.2), seed=s)] != sets for s in range(5))
    with pytest.raises(TransitionError, match="expected at least 3 episodes to hold some out, found 2"):
        list(split(some.take(some.episode < 2), (0.2, 0.2), seed=0))


def test_held_out_episodes_touch_as_often_as_others(some: Transitions) -> None:
    """Of 6 episodes 2 touch: one of them is held out for validation and not both, by any seed."""
    some = replace(some, contact=np.isin(some.episode, (1, 4)))
    for seed in range(20):
        training, validation, test = split(some, (0.3, 0.3), seed)
        touching = [len(np.unique(part.episode[part.contact])) for part in (training, validation, test)]
        assert [len(np.unique(part.episode)) for part in (training, validation, test)] == [2, 2, 2]
        assert touching[1] == 1 and sum(touching) == 2


def test_long_episodes_are_cut(some: Transitions) -> None:
    pieces = cut(some, 0.3)
    counts = np.bincount(pieces.episode)
    assert set(counts) == {15, 5} and len(counts) == 6 * 4
    assert (some.episode[np.flatnonzero(np.diff(pieces.episode)) + 1] >= 0).all()
    for episode in range(6):  # no piece is of two episodes
        assert len(set(pieces.episode[some.episode == episode]) & set(pieces.episode[some.episode != episode])) == 0


def write_run(
    path: Path, rate: float = 1000.0, rows: int = 201, missing: int | None = None, clamped: int | None = None
) -> np.ndarray:
    """Write a log as a run of arm2 leaves it; return its numbers."""
    rng = np.random.default_rng(0)
    columns = [("t", "s")]
    columns += [
        (f"{part}.{joint}", unit) for part, unit in (("q", "rad"), ("v", "rad/s"), ("u", "N·m")) for joint in ("shoulder", "elbow")
    ]
    columns += [("gate.clamped", "1")]
    data = np.column_stack([np.arange(rows) / rate, rng.normal(size=(rows, 6)), np.zeros(rows)])
    if clamped is not None:
        data[clamped, -1] = 1
    if missing is not None:
        data = np.delete(data, missing, 0)
    writer = LogWriter(path, columns, {"robot": "arm2", "joints": ["shoulder", "elbow"], "control_rate_hz": rate})
    for row in data:
        writer.add(row)
    writer.close()
    return data


def test_a_run_s_log_becomes_transitions(tmp_path: Path) -> None:
    source = source_of(load_robot("arm2"), (True, True), 0.02)
    data = write_run(tmp_path / "log.csv")
    found = from_run(tmp_path / "log.csv", source)
    assert len(found) == 10 and source.command == "N·m" and found.follows()[1:].all()
    np.testing.assert_allclose(found.x[3], data[60, 1:5], rtol=1e-8)
    np.testing.assert_allclose(found.x_next[3], data[80, 1:5], rtol=1e-8)
    np.testing.assert_allclose(found.u[3], data[60:80, 5:7].mean(0), rtol=1e-6)


def test_a_run_that_touches_says_when(tmp_path: Path) -> None:
    from mbctrl.base.config import RunConfig, load_run, merged
    from mbctrl.cli.session import Session

    config, file = load_run("panda_wipe_sim")
    quick = {"duration": 3.0, "planner": {"samples": 64}, "dynamics": {"backend": "kernel"}}
    session = Session(RunConfig.model_validate(merged(config.model_dump(), quick)), file, lockstep=True)
    session.run(tmp_path / "run")
    found = from_run(tmp_path / "run" / "log.csv", source_of(session.robot, session.model.tree.revolute, 0.02))
    assert len(found) > 95 and 0.05 < found.contact.mean() < 0.95 and found.impacts().any()
    deep = found.x[:, 7] < -1e-3  # the table's slide: pressed down only where it was touched
    log = read_log(tmp_path / "run" / "log.csv")
    np.testing.assert_allclose(found.u, log["u"][found.row + 18], rtol=1e-8)  # in force last before the step's end
    assert deep.any() and found.contact[deep].all() and not found.contact[found.t < 0.5].any()


def test_stretches_the_log_does_not_tell_are_left_out(tmp_path: Path) -> None:
    source = source_of(load_robot("arm2"), (True, True), 0.02)
    data = write_run(tmp_path / "late.csv", missing=70)
    late = from_run(tmp_path / "late.csv", source)
    assert len(late) == 8 and not np.isclose(late.t, 0.06).any()
    assert [int(row) for row in late.row[:4]] == [1, 21, 41, 81] and late.follows().sum() == 6
    np.testing.assert_allclose(late.x[3], data[80, 1:5], rtol=1e-8)
    write_run(tmp_path / "clamped.csv", clamped=45)
    clamped = from_run(tmp_path / "clamped.csv", source)
    assert len(clamped) == 9 and not np.isclose(clamped.t, 0.04).any()


def test_another_robot_s_log_and_another_time_step_are_refused(model: Model, some: Transitions, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_run(path)
    with pytest.raises(LogError, match=r"log.csv: robot: expected peg, found arm2"):
        from_run(path, source_of(model.robot, model.tree.revolute, DT))
    arm2 = load_robot("arm2")
    with pytest.raises(LogError, match=r"log.csv: dt: expected dt a multiple of the control period 0.001 s, found 0.0005 s"):
        from_run(path, source_of(arm2, (True, True), 0.0005))
    with pytest.raises(LogError, match=r"log.csv: u.shoulder: expected commands in rad, found N·m"):
        from_run(path, replace(source_of(arm2, (True, True), 0.02), command="rad"))
    write_transitions(tmp_path / "a.parquet", some)
    with pytest.raises(TransitionError, match=r"a.parquet: dt: expected 0.01, found 0.02"):
        read_all([tmp_path / "a.parquet"], replace(some.source, dt=0.01))
    with pytest.raises(TransitionError, match=r"a.parquet: joints: expected \('y',\), found \('z',\)"):
        read_all([tmp_path / "a.parquet"], replace(some.source, joints=("y",)))


def test_rows_of_a_made_set_are_checked(some: Transitions) -> None:
    u = some.u.copy()
    u[2] = np.inf
    with pytest.raises(TransitionError, match="memory: row 3: u_z is inf"):
        made(some.source, some.x, u, some.x_next)
