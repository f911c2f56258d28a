"""Reading logs and the checks before fitting: every format, every fault planted and named, no false alarms."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from mcap_ros2.writer import Writer
from sample_logs import ARMS, changed, columns_of, model_of, sample_recording, spec_of, write_csv

from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.logs import LogError, LogWriter, read_log
from mbctrl.base.spec import validate
from mbctrl.calibrate.checks import check_recording, outliers
from mbctrl.calibrate.logs import read_recording
from mbctrl.calibrate.recipe import LogSpec, Signal
from mbctrl.calibrate.recording import Recording

DATA = Path(os.environ.get("MBCTRL_DATA", ""), "ur10e")
real = pytest.mark.skipif(not os.environ.get("MBCTRL_DATA") or not DATA.is_dir(), reason="MBCTRL_DATA/ur10e is not there")
SHORT = sample_recording(seconds=2.0)
ROBOT = model_of("arm2").robot
WIDTH = len(columns_of(SHORT))
NUMBERS = {
    "header": False,
    "time": {"column": 1},
    "position": {"columns": [2, 3], "unit": "rad"},
    "velocity": {"columns": [4, 5], "unit": "rad/s"},
    "effort": {"columns": [6, 7], "unit": "N·m"},
}


def check(recording: Recording, with_model: bool = True) -> list[str]:
    model = next(model_of(arm) for arm in ARMS if model_of(arm).robot.joints == recording.joints)
    return check_recording(recording, model.robot, model.tree if with_model else None)


def same(found: Recording, expected: Recording, tolerance: float = 1e-12) -> None:
    for name in ("t", "q", "v", "effort"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape and np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


# --- formats ----------------------------------------------------------------------------------------------------------


def save_csv(path: Path) -> LogSpec:
    write_csv(path, SHORT)
    return spec_of(SHORT)


def save_semicolons(path: Path) -> LogSpec:
    write_csv(path, SHORT, delimiter=";")
    return spec_of(SHORT, delimiter=";")


def save_blanks(path: Path) -> LogSpec:
    lines = write_csv(path, SHORT, header=False, delimiter="  ")
    path.write_text("\r\n".join(lines) + "\r\n")
    return spec_of(SHORT, **NUMBERS, delimiter=" ")


def save_numbered(path: Path) -> LogSpec:
    write_csv(path, SHORT, header=False)
    return spec_of(SHORT, **NUMBERS, width=WIDTH)


def save_gzip(path: Path) -> LogSpec:
    plain = path.with_suffix("")
    write_csv(plain, SHORT)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return spec_of(SHORT)


def save_npz(path: Path) -> LogSpec:
    np.savez(path, t=SHORT.t, q=SHORT.q, v=SHORT.v, tau=SHORT.effort, note="plain text")
    joints = {"columns": [f"q.{joint}" for joint in SHORT.joints], "unit": "rad"}
    return spec_of(SHORT, position=joints, velocity={"columns": ["v[0]", "v[1]"], "unit": "rad/s"})


def save_parquet(path: Path) -> LogSpec:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * len(SHORT.t), **columns_of(SHORT)}), path)
    return spec_of(SHORT, velocity={"columns": [5, 6], "unit": "rad/s"})


def save_run_log(path: Path) -> LogSpec:
    units = {"t": "s", "q": "rad", "v": "rad/s", "tau": "N·m"}
    columns = columns_of(SHORT)
    log = LogWriter(path, [(name, units[name.partition(".")[0]]) for name in columns], {"robot": "arm2"})
    for row in np.stack(list(columns.values()), axis=1).tolist():
        log.add(row)
    log.close()
    return spec_of(SHORT)


SAVERS = {
    "a.csv": save_csv,
    "b.txt": save_semicolons,
    "c.txt": save_blanks,
    "d.CSV": save_numbered,
    "e.csv.gz": save_gzip,
    "f.npz": save_npz,
    "g.parquet": save_parquet,
}


@pytest.mark.parametrize("name", SAVERS)
def test_every_format_reads_back_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    found = read_recording(path, SAVERS[name](path), ROBOT)
    same(found, SHORT)
    assert found.joints == ROBOT.joints and found.parts == ((0, len(SHORT.t)),) and found.warnings == ()
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and found.file == str(path)
    first = 2 if name in ("a.csv", "b.txt", "e.csv.gz") else 1
    assert (found.lines == np.arange(first, first + len(SHORT.t))).all(), found.lines
    excerpt = read_recording(path, SAVERS[name](path), ROBOT, rows=(11, 60))
    assert (excerpt.t == found.t[10:60]).all() and (excerpt.lines == found.lines[10:60]).all()


def test_a_run_log_is_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    found = read_recording(path, save_run_log(path), ROBOT)
    same(found, SHORT, 1e-8)
    assert np.abs(found.q - read_log(path)["q"]).max() < 1e-15 and found.lines[0] == 3
    degrees = {"columns": ["q.shoulder", "q.elbow [rad]"], "unit": "deg"}
    with pytest.raises(LogError, match=r"log.csv: column 'q.shoulder': expected \[deg\] as in the recipe, found \[rad\]"):
        read_recording(path, spec_of(SHORT, position=degrees), ROBOT)


# --- MCAP -------------------------------------------------------------------------------------------------------------

JOINT_STATE = """std_msgs/Header header
string[] name
float64[] position
float64[] velocity
float64[] effort
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
TEXT = "string data\n"


def save_mcap(path: Path, edit: Callable[[int, dict[str, Any]], None] | None = None, topics: tuple[str, ...] = ("/state",)) -> None:
    """Write JointState messages whose joints change places from one message to the next, a gripper's among them."""
    with path.open("wb") as file, Writer(file) as writer:
        schema = writer.register_msgdef("sensor_msgs/msg/JointState", JOINT_STATE)
        text = writer.register_msgdef("std_msgs/msg/String", TEXT)
        writer.write_message("/note", text, {"data": "hello"}, log_time=0)
        for k, t in enumerate(SHORT.t):
            order = [0, 1] if k % 3 else [1, 0]
            values = {"position": SHORT.q[k], "velocity": SHORT.v[k], "effort": SHORT.effort[k]}
            message = {key: [0.5, *x[order]] for key, x in values.items()}
            message["name"] = ["finger", *(SHORT.joints[j] for j in order)]
            stamp = 1_700_000_000_000_000_000 + round(t * 1e9)
            message["header"] = {"stamp": {"sec": stamp // 10**9, "nanosec": stamp % 10**9}, "frame_id": ""}
            gripper = {**message, "name": ["finger"], "position": [0.5], "velocity": [], "effort": []}
            if edit:
                edit(k, message)
            for topic in topics:
                writer.write_message(topic, schema, gripper, log_time=stamp + 1000)
                writer.write_message(topic, schema, message, log_time=stamp + 2000)


def mcap_spec(**change: Any) -> LogSpec:
    joints = list(SHORT.joints)
    units = {"position": "rad", "velocity": "rad/s", "effort": "N·m"}
    data = {key: {"columns": joints, "unit": unit} for key, unit in units.items()}
    return LogSpec.model_validate({"topic": "/state", "time": {"column": "stamp"}, **data, **change})


@pytest.mark.parametrize("change", [{}, {"topic": None}, {"time": {"column": "log_time"}}], ids=str)
def test_mcap_joints_are_found_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "log.mcap"
    save_mcap(path)
    found = read_recording(path, mcap_spec(**change), ROBOT)
    same(found, changed(SHORT, t=SHORT.t - SHORT.t[0]))
    assert (found.lines == 2 * np.arange(1, len(SHORT.t) + 1)).all()


def shorten(key: str) -> Callable[[int, dict[str, Any]], None]:
    return lambda k, message: message.update({key: message[key][:2]}) if k == 4 else None


@pytest.mark.parametrize(
    ("edit", "change", "expected"),
    [
        (shorten("velocity"), {}, r"line 10, column 'elbow': expected 3 values of velocity, found 2"),
        (lambda k, m: m["name"].__setitem__(2, "albow"), {}, r"line 2, column 'shoulder': no such joint.*known: .*albow"),
        (None, {"topic": "/stat"}, r"/stat: no such topic; did you mean '/state'"),
        (None, {"topic": "/note"}, r"/note: expected sensor_msgs/msg/JointState messages, found std_msgs/msg/String"),
        (None, {"time": {"column": "t"}}, r"column 't': expected 'stamp' or 'log_time'"),
        (
            None,
            {"command": {"columns": ["shoulder", "elbow"], "unit": "rad"}},
            r"column 'shoulder': a JointState message has no command",
        ),
        (None, {"position": {"columns": [1, 2], "unit": "rad"}}, r"column 1: expected a joint's name"),
        (None, {"position": {"columns": ["a", "b"], "unit": "rad"}}, r"/state: no message holds any of the joints a, b"),
    ],
)
def test_mcap_faults_are_named(tmp_path: Path, edit: Any, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "log.mcap"
    save_mcap(path, edit)
    with pytest.raises(LogError, match=r"log\.mcap: " + expected):
        read_recording(path, mcap_spec(**change), ROBOT)


def test_mcap_with_two_topics_or_a_cut_end(tmp_path: Path) -> None:
    path = tmp_path / "log.mcap"
    save_mcap(path, topics=("/a", "/b"))
    with pytest.raises(LogError, match=r"topic: expected one topic of JointState messages, found /a, /b"):
        read_recording(path, mcap_spec(topic=None), ROBOT)
    for length in (len(path.read_bytes()) // 2, 3):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(LogError, match=r"log\.mcap: cut or damaged: .+; 'mcap recover' may help"):
            read_recording(path, mcap_spec(topic="/a"), ROBOT)


# --- units, signs, couplings ------------------------------------------------------------------------------------------


def test_units_signs_couplings_and_gains(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    gains, matrix, offset = np.array([2.0, 0.5]), np.array([[1.0, 0.0], [0.3, 0.5]]), np.array([0.1, -0.2])
    motors = np.rad2deg((SHORT.q - offset) @ np.linalg.inv(matrix).T) * [1, -1]
    current = SHORT.effort / gains * 1000 * [-1, 1]
    write_csv(path, changed(SHORT, t=SHORT.t * 1000, q=motors, effort=current))
    spec = spec_of(
        SHORT,
        time={"column": "t", "unit": "ms"},
        position={
            "columns": ["q.shoulder", "q.elbow"],
            "unit": "deg",
            "sign": [1, -1],
            "matrix": matrix.tolist(),
            "offset": offset.tolist(),
        },
        effort={"columns": ["tau.shoulder", "tau.elbow"], "unit": "mA", "sign": [-1, 1]},
        gains=gains.tolist(),
    )
    found = read_recording(path, spec, ROBOT)
    same(found, SHORT, 1e-12)
    assert (found.gains == gains).all()


def test_without_stamps_the_rate_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_csv(path, SHORT)
    found = read_recording(path, spec_of(SHORT, time=None, rate=250), ROBOT)
    assert found.t[0] == 0 and abs(found.rate - 250) < 1e-9


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"columns": ["a", "a"]}, "columns: 'a' appears twice"),
        ({"sign": [1]}, "sign: expected 2 values, one a column, found 1"),
        ({"matrix": [[1, 2], [1]]}, r"matrix\[1\]: expected 2 values"),
        ({"offset": [0, 0, 0]}, "offset: expected 2 values, one a column, found 3"),
    ],
)
def test_a_signal_that_contradicts_itself_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        validate(Signal, {"columns": ["a", "b"], "unit": "rad", **change})


def test_a_recipe_for_another_robot_is_refused(tmp_path: Path) -> None:
    one = {"columns": ["q.shoulder"], "unit": "rad"}
    with pytest.raises(SpecError, match="position.columns: expected 2 columns, one for each joint of arm2, found 1"):
        read_recording(tmp_path / "log.csv", spec_of(SHORT, position=one), ROBOT)
    amperes = {"columns": ["tau.shoulder", "tau.elbow"], "unit": "A"}
    with pytest.raises(SpecError, match="gains: expected 2 values, one for each joint of arm2, found 1"):
        read_recording(tmp_path / "log.csv", spec_of(SHORT, effort=amperes, gains=[1]), ROBOT)


# --- faults of files --------------------------------------------------------------------------------------------------

LINES = write_csv(Path(os.devnull), SHORT)


def cell(line: int, column: int, value: str) -> list[str]:
    """Return the good log with one cell replaced; both counted from 1."""
    lines = list(LINES)
    cells = lines[line - 1].split(",")
    cells[column - 1] = value
    lines[line - 1] = ",".join(cells)
    return lines


def time_at(line: int) -> str:
    return LINES[line - 1].split(",")[0]


FAULTS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "text": (cell(7, 3, "oops"), {}, "line 7, column 3: expected a number, found 'oops'"),
    "empty": (cell(9, 2, ""), {}, "line 9, column 2: expected a number, found ''"),
    "nan": (cell(12, 4, "nan"), {}, "line 12, column 'v.shoulder': expected a finite number, found nan"),
    "inf": (cell(12, 4, "-inf"), {}, "line 12, column 'v.shoulder': expected a finite number, found -inf"),
    "absurd": (cell(5, 6, "-1.6e306"), {}, r"line 5, column 'tau.shoulder': expected at most 1e\+06 N·m, found -1.6e\+306"),
    "late": (cell(2, 1, "1.7e18"), {}, r"line 2, column 't': expected at most 1e\+11 s, found 1.7e\+18"),
    "back": (cell(20, 1, time_at(5)), {}, "line 20, column 't': time goes backwards: expected more than 0.17 s, found 0.03"),
    "still": (cell(20, 1, time_at(19)), {}, "line 20, column 't': time stands still: expected more than 0.17 s, found 0.17"),
    "short": ([*LINES[:9], "1,2,3", *LINES[9:]], {}, "line 10: expected 7 columns, as in the header, found 3"),
    "long": ([*LINES[:9], LINES[9] + ",1", *LINES[10:]], {}, "line 10: expected 7 columns, as in the header, found 8"),
    "blank": ([*LINES[:9], "", *LINES[9:]], {}, "line 10: expected 7 columns, as in the header, found 1"),
    "wide": (LINES, {"width": 31}, "line 1: expected 31 columns, found 7"),
    "number": (LINES, {"position": {"columns": [2, 9], "unit": "rad"}}, "line 1: expected at least 9 columns, found 7"),
    "name": (LINES, {"time": {"column": "tt"}}, "column 'tt': no such column; did you mean 't'"),
    "twice": ([LINES[0].replace("v.elbow", "t"), *LINES[1:]], {}, "column 't': appears more than once"),
    "delimiter": (LINES, {"delimiter": ";"}, "column 't': no such column.*; is ';' the delimiter"),
    "headless": (LINES[1:], {}, "line 1: expected a header, found numbers; header: false"),
    "named": (LINES, {"header": False}, "column 't': a column by name needs a header"),
    "headed": (LINES, NUMBERS, "line 1, column 1: expected a number, found 't'"),
    "few": (LINES[:12], {}, "expected at least 20 samples, found 11"),
    "none": (LINES[:1], {}, "rows: no data"),
    "nothing": ([], {}, "no data"),
    "rate": (LINES, {"rate": 1000}, "column 't': expected about 1000 samples a second, found 100; is s the unit of time"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    lines, change, expected = FAULTS[name]
    path = tmp_path / "log.csv"
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(LogError, match=r"log\.csv: " + expected) as caught:
        read_recording(path, spec_of(SHORT, **change), ROBOT)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    spec = spec_of(SHORT)
    cases = {
        "none.csv": (None, "no such file"),
        "a.xlsx": (b"PK", r"expected a log in \.csv"),
        "a.npz.gz": (b"", r"expected a log in \.csv"),
        "a.csv": (b"\xff\xfe\x00", "cannot be read: 'utf-8'"),
        "a.csv.gz": (gzip.compress(b"t,q\n" * 1000)[:-12], "cannot be read"),
        "a.npz": (b"PK\x03\x04 broken", "cannot be read"),
        "a.parquet": (b"PAR1 broken", "cannot be read"),
        "a.mcap": (b"broken", "cut or damaged"),
    }
    for name, (raw, expected) in cases.items():
        path = tmp_path / name
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(LogError, match=re.escape(str(path)) + ": " + expected):
            read_recording(path, mcap_spec() if name == "a.mcap" else spec, ROBOT)


def test_arrays_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "log.npz"
    spec = save_npz(path)
    arrays = {"t": SHORT.t, "q": SHORT.q, "v": SHORT.v, "tau": SHORT.effort}
    hole = np.where(np.arange(400).reshape(200, 2) == 61, np.nan, SHORT.effort)
    cases = {
        "column 'v.x'.*": (arrays, {"velocity": {"columns": ["v.x", "v[1]"], "unit": "rad/s"}}, "no such column"),
        "column 'q.shoulder'": ({**arrays, "q": SHORT.q[:50]}, {}, "expected 200 values, as in column 't', found 50"),
        "column 'v\\[0\\]'": ({**arrays, "v": SHORT.v.astype(str)}, {}, "expected numbers, found <U"),
        "line 31, column 'tau.elbow'": ({**arrays, "tau": hole}, {}, "expected a finite number, found nan"),
    }  # fmt: skip
    for place, (content, change, expected) in cases.items():
        np.savez(path, **content)
        with pytest.raises(LogError, match=rf"log\.npz: {place}: {expected}"):
            read_recording(path, spec.model_copy(update=signals(change)), ROBOT)
    np.savez(path, **{**arrays, "t": np.array([{}] * 200, dtype=object)})
    with pytest.raises(LogError, match=r"log\.npz: cannot be read: .*allow_pickle"):
        read_recording(path, spec, ROBOT)


def signals(change: dict[str, Any]) -> dict[str, Signal]:
    return {key: Signal.model_validate(value) for key, value in change.items()}


@pytest.mark.parametrize("rows", [(0, 5), (5, 4), (1, 201), (300, 400)])
def test_rows_that_are_not_there(tmp_path: Path, rows: tuple[int, int]) -> None:
    path = tmp_path / "log.csv"
    write_csv(path, SHORT)
    with pytest.raises(LogError, match=f"rows: expected rows within 1 to 200, found {rows[0]} to {rows[1]}"):
        read_recording(path, spec_of(SHORT), ROBOT, rows=rows)


def test_garbage_outside_of_the_excerpt_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join([*cell(4, 3, "1e300")[:150], "cut", *LINES[150:], ""]))
    found = read_recording(path, spec_of(SHORT), ROBOT, rows=(10, 100))
    assert (found.lines == np.arange(11, 102)).all() and (found.t == SHORT.t[9:100]).all()


# --- what may pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\0" * 100])
@pytest.mark.parametrize("last", [LINES[-1][:-3], ",".join(LINES[-1].split(",")[:3])])
def test_a_cut_last_line_is_left_out(tmp_path: Path, last: str, end: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join([*LINES[:-1], last]) + end)
    found = read_recording(path, spec_of(SHORT), ROBOT)
    assert (found.t == SHORT.t[:-1]).all()
    assert found.warnings == ("line 201: the last line has no end; taken as cut and left out",)
    assert len(read_recording(path, spec_of(SHORT), ROBOT, rows=(1, 200)).t) == 199


def test_repeated_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join([*LINES[:30], LINES[29], LINES[29], *LINES[30:90], LINES[89], *LINES[90:], ""]))
    found = read_recording(path, spec_of(SHORT), ROBOT)
    same(found, SHORT)
    assert found.warnings == ("line 31: 3 rows repeat the one before, the first one here; left out",)
    assert found.lines[29] == 33


def test_a_slow_robot_behind_a_fast_logger_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    held = np.arange(len(SHORT.t)) // 2 * 2
    write_csv(path, changed(SHORT, q=SHORT.q[held], v=SHORT.v[held], effort=SHORT.effort[held]))
    (warning,) = read_recording(path, spec_of(SHORT), ROBOT).warnings
    assert warning.startswith("line 3: 100 of 200 samples have the values of the one before") and "faster" in warning


def test_gaps_split_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join([*LINES[:50], *LINES[60:100], *LINES[130:], ""]))
    found = read_recording(path, spec_of(SHORT), ROBOT)
    assert found.parts == ((0, 49), (49, 89), (89, 160))
    assert found.warnings == ("line 91: 2 gaps, the longest of 0.31 s here; the log is split there",)
    assert read_recording(path, spec_of(SHORT, largest_gap=0.2), ROBOT).parts == ((0, 89), (89, 160))


@pytest.mark.parametrize(("jitter", "warned"), [(0.01, False), (0.1, True)])
def test_uneven_stamps_are_noticed(tmp_path: Path, jitter: float, warned: bool) -> None:
    path = tmp_path / "log.csv"
    recording = sample_recording(seconds=4.0, jitter=jitter)
    write_csv(path, recording)
    warnings = read_recording(path, spec_of(recording), ROBOT).warnings
    assert [warning.startswith("uneven stamps") for warning in warnings] == [True] * warned


# --- checks: no false alarms ------------------------------------------------------------------------------------------

CLEAN: dict[str, dict[str, Any]] = {
    "plain": {},
    "without velocity": {"velocity": False},
    "quantised": {"quantum": 1e-4},
    "at rest": {"quantum": 1e-3, "rest": 1.5, "velocity": False},
    "jitter": {"rate": 250.0, "jitter": 0.2, "seconds": 8.0},
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("arm", ARMS)
def test_clean_logs_pass(arm: str, seed: int) -> None:
    for name, options in CLEAN.items():
        recording = sample_recording(arm, seed, **options)
        assert check(recording) == [], name
        assert not outliers(recording).any(), name


# --- checks: planted faults -------------------------------------------------------------------------------------------


def scaled(name: str, factor: float, *joints: int) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        x = getattr(r, name).copy()
        x[:, list(joints) or slice(None)] *= factor
        return changed(r, **{name: x})

    return fault


def swapped(names: str, i: int, j: int) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        order = np.arange(r.n)
        order[[i, j]] = j, i
        return changed(r, **{name: getattr(r, name)[:, order] for name in names.split() if getattr(r, name) is not None})

    return fault


def frozen(first: int, past: int, joint: int) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        q = r.q.copy()
        q[first:past, joint] = q[first, joint]
        return changed(r, q=q)

    return fault


def constant(name: str, joint: int) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        x = getattr(r, name).copy()
        x[:, joint] = x[0, joint]
        return changed(r, **{name: x})

    return fault


def fully(*faults: Callable[[Recording], Recording]) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        for one in faults:
            r = one(r)
        return r

    return fault


DEG = 180 / np.pi
PAN, LIFT, ELBOW = "shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint"
# Name: arm, velocities logged, fault, what the error says.
PLANTED: dict[str, tuple[str, bool, Callable[[Recording], Recording], str]] = {
    "degrees": ("ur10e", True, scaled("q", DEG), PAN + ": .*57.3 times.*positions look like degrees given as radians"),
    "degrees, no velocity": ("ur10e", False, scaled("q", DEG), PAN + ": .*looks like degrees given as radians"),
    "all in degrees": ("ur10e", True, fully(scaled("q", DEG), scaled("v", DEG)), PAN + ": .*looks like degrees given as radians"),
    "one in degrees": ("ur10e", True, scaled("q", DEG, 2), ELBOW + ": .*positions look like degrees given as radians$"),
    "radians as degrees": ("ur10e", True, scaled("q", 1 / DEG), PAN + ": .*0.0175 times.* like radians given as degrees"),
    "radians as degrees, no velocity": ("ur10e", False, scaled("q", 1 / DEG), ".*: positions look like radians given as degrees"),
    "deg/s": ("arm2", True, scaled("v", DEG), "shoulder: .*velocities look like deg/s given as rad/s$"),
    "gear ratio": ("arm2", True, scaled("q", 3, 1), "elbow: the position moves 3 times .*gear ratio"),
    "reversed position": ("ur10e", True, scaled("q", -1, 2), ELBOW + ": .*-1 times.*sign of one of them is reversed"),
    "reversed velocity": ("arm2", True, scaled("v", -1, 0), "shoulder: .*sign of one of them is reversed"),
    "reversed position, no velocity": ("ur10e", False, scaled("q", -1, 2), ELBOW + ": the sign of its position is reversed"),
    "reversed elbow, no velocity": ("arm2", False, scaled("q", -1, 1), "elbow: .*sign of its position is reversed"),
    "reversed effort": ("ur10e", True, scaled("effort", -1, 1), LIFT + ": the sign of its effort is reversed;"),
    "reversed effort, no velocity": ("ur10e", False, scaled("effort", -1, 3), "wrist_1_joint: the sign of its effort is reversed"),
    "reversed effort of friction": ("ur10e", False, scaled("effort", -1, 5), "wrist_3_joint: .*sign of its effort is reversed"),
    "reversed arm2": ("arm2", False, scaled("effort", -1, 0), "shoulder: the sign of its effort is reversed"),
    "swapped positions": ("ur10e", True, swapped("q", 1, 2), f"{LIFT} and {ELBOW}: .*swapped columns"),
    "swapped velocities": ("arm2", True, swapped("v", 0, 1), "shoulder and elbow: .*swapped columns"),
    "swapped positions, no velocity": ("ur10e", False, swapped("q", 1, 2), f"{LIFT} and {ELBOW}: their position columns"),
    "swapped efforts": ("ur10e", True, swapped("effort", 1, 2), f"{LIFT} and {ELBOW}: their effort columns are swapped"),
    "swapped far efforts": ("ur10e", True, swapped("effort", 0, 4), PAN + " and wrist_2_joint: their effort columns"),
    "other order": ("ur10e", True, swapped("q v effort", 0, 2), f"{PAN} and {ELBOW}: all their columns are swapped"),
    "foreign velocity": (
        "arm2",
        True,
        lambda r: changed(r, v=np.stack([r.v[:, 0], np.cos(9 * r.t)], 1)),
        "elbow: the velocity is not the derivative of the position",
    ),
    "frozen": ("ur10e", True, frozen(300, 360, 4), "wrist_2_joint, lines 302 to 361: the position stays .* velocity says"),
    "frozen, no velocity": ("ur10e", False, frozen(200, 260, 4), "wrist_2_joint, lines 202 to 261: .*frozen encoder"),
    "frozen to the end": ("arm2", True, frozen(600, 1200, 1), "elbow, lines 602 to 1201: .*frozen encoder"),
    "frozen throughout": ("ur10e", True, constant("q", 3), "wrist_1_joint: the position stays within 0 rad while the velocity"),
    "dead velocity": ("arm2", True, constant("v", 0), "shoulder: the velocity is .* throughout .*dead column"),
    "dead effort": ("arm2", True, constant("effort", 1), "elbow: the effort is .* N·m throughout .*dead column"),
    "milliseconds": ("arm2", True, lambda r: changed(r, t=1e3 * r.t), "expected 5 to 20000 samples .* found 0.1: .*ms given as s"),
    "seconds as ms": ("arm2", False, lambda r: changed(r, t=1e-3 * r.t), "expected .* found 1e.05: stamps look like s given as ms"),
    "currents as torques": ("ur10e", True, scaled("effort", 0.1), LIFT + ".*: efforts are 0.1.* times .*currents given as torques"),
    "milliamperes": ("ur10e", True, scaled("effort", 1000), PAN + ": expected at most .* N·m.*milliamperes given as amperes"),
    "zero": ("ur10e", True, lambda r: changed(r, q=r.q - [0, np.pi / 2, 0, 0, 0, 0]), LIFT + ": its zero is 90 degrees off"),
    "whole turn": ("arm2", True, lambda r: changed(r, q=r.q + [0, 2 * np.pi]), "elbow: expected .* within -4.5 and 4.5 rad.*turns"),
    "no gravity": (
        "ur10e",
        True,
        lambda r: changed(r, effort=r.effort - holding(r)),
        ".*: the efforts look free of gravity",
    ),
}  # fmt: skip


def holding(r: Recording) -> np.ndarray:
    from mbctrl.dynamics.reference import ReferenceDynamics

    still = np.zeros_like(r.q)
    return ReferenceDynamics(model_of("ur10e").tree).inverse_dynamics(r.q, still, still)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_fault_is_named(name: str, seed: int) -> None:
    arm, velocity, fault, expected = PLANTED[name]
    with pytest.raises(LogError, match=rf"{arm}\.csv: (.* and )?{expected}") as caught:
        check(fault(sample_recording(arm, seed, velocity=velocity)))
    assert "\n" not in str(caught.value)


def test_a_position_outside_of_its_limits_that_fits_another_joint_is_named() -> None:
    recording = sample_recording("ur10e", velocity=False)
    turned = changed(recording, q=recording.q + np.array([4, 4, 0, -3, 4, 4]))
    with pytest.raises(LogError, match="elbow_joint: .*within -3.142 and 3.142 rad.* would fit .*_joint: swapped columns"):
        check(swapped("q", 2, 3)(turned), with_model=False)


def test_joints_of_another_robot_are_refused() -> None:
    with pytest.raises(MbctrlError, match=r"expected the joints \['shoulder', 'elbow'\]"):
        check_recording(sample_recording("ur10e"), ROBOT)


# --- checks: warnings -------------------------------------------------------------------------------------------------


def clip(name: str, joint: int, quantile: float) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        x = getattr(r, name).copy()
        x[:, joint] = np.minimum(x[:, joint], np.quantile(x[:, joint], quantile))
        return changed(r, **{name: x})

    return fault


def spiked(name: str, joint: int, size: float) -> Callable[[Recording], Recording]:
    def fault(r: Recording) -> Recording:
        x = getattr(r, name).copy()
        x[[100, 500, 501, 900], joint] += [size, 0, -size, size]
        return changed(r, **{name: x})

    return fault


def late(r: Recording) -> Recording:
    """Shift two stamps by half a period, at the sample after the 400th where both joints are fastest."""
    k = 400 + int(np.argmax(np.abs(r.v[400:800]).min(axis=1)))
    return changed(r, t=r.t + 0.5 / r.rate * (np.arange(len(r.t)) == k))


WARNED: dict[str, tuple[Callable[[Recording], Recording], str]] = {
    "saturated effort": (clip("effort", 0, 0.95), "shoulder: the effort is saturated at .* N·m for 5.* of the samples, from line"),
    "clipped position": (clip("q", 1, 0.9), "elbow: the position is clipped at its extreme for .* samples, from line"),
    "spikes of position": (spiked("q", 0, 0.05), r"line 102: isolated spikes in the position \(shoulder 3\), the first one here"),
    "spikes of velocity": (spiked("v", 1, 1.0), r"line 102: isolated spikes in the velocity \(elbow 3\)"),
    "spikes of effort": (spiked("effort", 1, 2.0), r"line 102: isolated spikes in the effort \(elbow 3\)"),
    "late stamp": (late, "stamps that fit no joint's position: 1, the first one here"),
    "not excited": (
        lambda r: changed(r, q=r.q * [1, 1e-3], v=r.v * [1, 1e-3]),
        "elbow: not excited, moves only 0.0.* rad",
    ),
    "contact": (lambda r: changed(r, q=r.q - r.q.min(axis=0) - 4.5), "shoulder: comes within 0.005 rad of its limit"),
    "too strong": (scaled("effort", 1.8), "shoulder: the effort reaches 1.* times its limit"),
    "too weak": (scaled("effort", 0.02), "(shoulder|elbow): no effort is more than 1.* currents given as torques"),
    "tiny": (scaled("q", 1 / DEG), "(shoulder|elbow): no joint moves more than 1 % of its range, .*radians given as degrees"),
    "slightly off": (scaled("v", 0.9), "shoulder: the position moves 1.11 times what the velocity says"),
    "held": (fully(constant("q", 0), scaled("v", 0, 0)), "shoulder: the position never changes while the effort does"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_may_pass_is_noticed(name: str) -> None:
    fault, expected = WARNED[name]
    recording = fault(sample_recording("arm2", 3))
    warnings = check(changed(recording, v=None) if name == "tiny" else recording, with_model=False)
    assert any(re.match(f"(line .*: )?{expected}", warning) for warning in warnings), warnings
    assert len(warnings) <= 2, warnings


@pytest.mark.parametrize(("name", "size"), [("q", 0.05), ("v", 1.0), ("effort", 2.0)])
def test_outliers_are_masked(name: str, size: float) -> None:
    mask = outliers(spiked(name, 1, size)(sample_recording("arm2", 4)))
    assert set(np.flatnonzero(mask)) == {100, 501, 900}


def test_a_rough_model_is_no_mistake_of_the_log() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        model = model_of("ur10e")
        rough = dataclasses.replace(
            model.tree,
            mass=model.tree.mass * rng.uniform(0.6, 1.6, 6),
            com=model.tree.com * rng.uniform(0.7, 1.3, (6, 1)),
            armature=model.tree.armature * rng.uniform(0, 2, 6),
        )
        assert check_recording(sample_recording("ur10e", seed, velocity=False), model.robot, rough) == []


def test_the_size_of_one_effort_is_judged() -> None:
    recording = sample_recording("ur10e")
    (warning,) = check(scaled("effort", 0.2, 1)(recording))
    assert re.match("shoulder_lift_joint: the effort is 0.2.* times the model's torque: a wrong unit, gain or column", warning)
    with pytest.raises(LogError, match="shoulder_lift_joint: the effort is 0.05.* times the model's torque"):
        check(scaled("effort", 0.05, 1)(recording))


def test_a_model_that_explains_nothing_is_noticed() -> None:
    recording = sample_recording("ur10e")
    noise = 20 * np.random.default_rng(0).normal(size=len(recording.t)).cumsum() / 30
    effort = recording.effort + np.stack([noise * (j == 4) for j in range(6)], axis=1)
    warnings = check(changed(recording, effort=effort))
    assert any(re.match("wrist_2_joint: the model explains only 0.* of the effort", warning) for warning in warnings), warnings


# --- real logs --------------------------------------------------------------------------------------------------------

GAINS = [10.0, 10.6956, 8.4566, 9.0029, 9.48, 10.1232]


def real_spec(**change: Any) -> LogSpec:
    data = {
        "header": False,
        "width": 31,
        "time": {"column": 1},
        "position": {"columns": list(range(2, 8)), "unit": "rad"},
        "velocity": {"columns": list(range(8, 14)), "unit": "rad/s"},
        "effort": {"columns": list(range(14, 20)), "unit": "A"},
        "gains": GAINS,
    }
    return LogSpec.model_validate({**data, **change})


def real_logs() -> list[Path]:
    return sorted(DATA.glob("ur-20_*.csv")) if os.environ.get("MBCTRL_DATA") else []


@real
@pytest.mark.parametrize("path", real_logs(), ids=lambda path: path.stem)
def test_real_logs_pass(path: Path) -> None:
    recording = read_recording(path, real_spec(), model_of("ur10e").robot)
    assert len(recording.parts) == 1 and any("uneven stamps" in warning for warning in recording.warnings)
    warnings = check(recording)
    assert len(warnings) <= 4 and not any("explains" in warning or "times" in warning for warning in warnings), warnings
    assert outliers(recording).mean() < 0.02
    for velocity in (recording.v, None):
        for name, fault in {
            "sign of its effort": scaled("effort", -1, 1),
            "sign of its position": scaled("q", -1, 1),
            "swapped": swapped("effort", 1, 2),
        }.items():
            with pytest.raises(LogError, match=f"shoulder_lift_joint.*: .*({name}|sign of one)"):
                check(fault(changed(recording, v=velocity)))


@real
@pytest.mark.parametrize(
    ("width", "expected"), [(31, "line 1: expected 31 columns, found 19"), (None, "line 3, column 3: .*e.184")]
)
def test_the_broken_real_log_is_refused(width: int | None, expected: str) -> None:
    path = DATA / "ur-19_09_27-11_32_02.csv"
    with pytest.raises(LogError, match=rf"{path.name}: {expected}"):
        read_recording(path, real_spec(width=width), model_of("ur10e").robot)


@pytest.mark.parametrize(
    ("width", "expected"), [(31, "line 1: expected 31 columns, found 19"), (None, r"line 3, column 3: expected at most .*e\+184")]
)
def test_a_broken_log_is_refused(tmp_path: Path, width: int | None, expected: str) -> None:
    path = tmp_path / "broken.csv"
    rows = np.random.default_rng(0).normal(size=(40, 19))
    rows[:, 0] = np.arange(40) * 0.01
    rows[2:12:4, 2] = -1.6e184
    rows[4, 9:] = 3e306
    np.savetxt(path, rows, fmt="%.4f", delimiter=",")
    with pytest.raises(LogError, match=rf"broken\.csv: {expected}"):
        read_recording(path, real_spec(width=width), model_of("ur10e").robot)
