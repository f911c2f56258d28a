"""What is put into a log is read back; a dead log process or a full disk costs the log and nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mbctrl.base.errors import SpecError
from mbctrl.base.robot import load_robot
from mbctrl.runtime import recorder as module
from mbctrl.runtime.logfile import log_header, read_recording, record_dtype
from mbctrl.runtime.recorder import Recorder

ROBOT = load_robot("panda")
DTYPE = record_dtype(ROBOT)
HEADER = log_header(ROBOT, epoch=time.monotonic(), bundle="sha256:0", modes=["RUN", "HOLD", "STOP", "SAFE"])


def record(n: int) -> np.ndarray:
    """Return the n-th of a run's records; different in every field."""
    one = np.zeros((), DTYPE)
    for i, name in enumerate(DTYPE.names):
        if DTYPE[name].base.kind in "iu":
            one[name] = (n + i) % 251
        else:
            one[name] = n * 0.001 + i + np.arange(one[name].size).reshape(one[name].shape) * 0.1
    one["t"], one["mode"], one["plan_seq"] = n * 0.001, n // 400 % 4, n // 100
    one["seq"] = n
    return one


def wait_for(what, limit: float = 30.0):
    deadline = time.monotonic() + limit
    while not (got := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return got


@pytest.fixture
def opened(tmp_path):
    recorders = []

    def opened(path: Path = tmp_path / "log.mcap", **options) -> Recorder:
        recorders.append(Recorder(path, DTYPE, HEADER, **{"rate": 1000.0, **options}))
        recorders[-1].open()
        return recorders[-1]

    yield opened
    for one in recorders:
        one.close()


def made(path: Path, number: int) -> None:
    """Write a log of ``number`` records without a log process."""
    recorder = Recorder(path, DTYPE, HEADER, rate=1000.0)
    for n in range(number):
        recorder.put(record(n))
    recorder.dump(path)


def written(recorder: Recorder) -> int:
    return int(recorder._status.read()[1]["written"])


def feed(recorder: Recorder, start: int, end: int) -> None:
    """Put records in no faster than they are written."""
    for n in range(start, end):
        wait_for(lambda: len(recorder._records) < 1000)
        recorder.put(record(n))


def check(recording, numbers) -> None:
    """The recording holds these records, in this order, to the last bit."""
    expected = np.array([record(n) for n in numbers], DTYPE)
    for topic, names in (
        ("/state", ("t", "stamp", "seq", "q", "v", "tau")),
        ("/command", ("q_ref", "v_ref", "torque", "mode", "clamped")),
    ):
        for name in names:
            assert np.array_equal(recording.topics[topic][name], expected[name]), (topic, name)
    plan = recording.topics["/plan"]
    first = np.unique(expected["plan_seq"], return_index=True)[1]
    assert np.array_equal(plan["plan_seq"], expected["plan_seq"][first]) and np.array_equal(
        plan["latency"], expected["latency"][first]
    )


def test_what_is_written_is_read_back(opened, tmp_path):
    recorder = opened()
    feed(recorder, 0, 1000)
    recorder.event(0.5, "warning", "ein Gerät — " + "ü" * 300)
    assert recorder.healthy and recorder.trouble == ""
    recorder.close()
    recorder.close()
    recording = read_recording(tmp_path / "log.mcap")
    check(recording, range(1000))
    assert recording.whole and recorder.lost == 0
    assert recording.header["joints"] == list(ROBOT.joints) and recording.header["bundle"] == "sha256:0"
    assert recording.header["limits"]["velocity"] == list(ROBOT.limits.velocity) and "mbctrl" in recording.header["versions"]
    (event,) = recording.events
    assert event["t"] == 0.5 and event["level"] == "warning" and event["text"].startswith("ein Gerät — üü")


def test_the_file_is_what_foxglove_reads(opened, tmp_path):
    from mcap.reader import make_reader

    recorder = opened()
    bad = record(1)
    bad["q"][2], bad["tau"][0] = np.nan, np.inf
    recorder.put(bad)
    recorder.close()
    with open(tmp_path / "log.mcap", "rb") as stream:
        messages = {channel.topic: (schema, message) for schema, channel, message in make_reader(stream).iter_messages()}
    schema, message = messages["/state"]
    properties = json.loads(schema.data)["properties"]
    assert schema.encoding == "jsonschema" and properties["q"]["description"].startswith("joint1, joint2")
    assert message.log_time == HEADER["started_ns"] + 1_000_000
    read = json.loads(message.data, parse_constant=pytest.fail)  # NaN is no JSON
    assert read["q"][2] is None and read["tau"][0] is None and set(read) == set(properties)
    assert np.isnan(read_recording(tmp_path / "log.mcap").topics["/state"]["q"][0, 2])


def test_a_killed_log_process_leaves_a_readable_file(opened, tmp_path):
    recorder = opened()
    feed(recorder, 0, 2000)
    wait_for(lambda: written(recorder) == 2000)
    os.kill(recorder._process.pid, signal.SIGKILL)
    wait_for(lambda: not recorder.healthy)
    assert recorder.trouble == "the log process died"
    recording = read_recording(tmp_path / "log.mcap")
    kept = len(recording.topics["/state"]["t"])
    assert 0.95 * 2000 <= kept <= 2000 and not recording.whole
    assert np.array_equal(recording.topics["/state"]["q"], np.array([record(n)["q"] for n in range(kept)]))


def test_the_control_side_goes_on_without_a_log_process_and_dumps_its_black_box(opened, tmp_path):
    recorder = opened(seconds=0.5, backlog=0.3)
    os.kill(recorder._process.pid, signal.SIGKILL)
    recorder._process.join(10)
    for n in range(1234):
        recorder.put(record(n))
    for n in range(1100):
        recorder.event(n * 0.001, "error", f"event {n}")
    assert recorder.lost == 1234 - 300 and not recorder.healthy
    recorder.dump(tmp_path / "box.mcap")
    box = read_recording(tmp_path / "box.mcap")
    assert np.array_equal(box.topics["/state"]["seq"], range(734, 1234))
    check(box, range(734, 1234))
    assert box.whole and [event["text"] for event in box.events] == [f"event {n}" for n in range(100, 1100)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box.mcap", "log.mcap"]


def test_a_black_box_that_is_not_full_and_one_that_cannot_be_written(tmp_path):
    recorder = Recorder(tmp_path / "log.mcap", DTYPE, HEADER, rate=1000.0)  # never opened
    for n in range(3):
        recorder.put(record(n))
    assert recorder.last()["seq"].tolist() == [0, 1, 2] and not recorder.healthy
    with pytest.raises(SpecError, match="box.mcap: cannot be written"):
        recorder.dump(tmp_path / "no" / "box.mcap")


def test_a_full_disk_ends_the_log_and_nothing_else(opened, tmp_path):
    recorder = opened(seconds=0.5)
    before = resource.prlimit(recorder._process.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    assert before[0] != 200_000
    n = 0
    while recorder.healthy:
        recorder.put(record(n))
        wait_for(lambda: len(recorder._records) < 1000 or not recorder.healthy)
        n += 1
        assert n < 200_000
    assert "log.mcap: File too large" in recorder.trouble
    for later in range(n, n + 5000):  # nothing raised, nothing waited for
        recorder.put(record(later))
    recorder.event(0.0, "error", "after the end")
    assert recorder.lost > 0
    kept = len(read_recording(tmp_path / "log.mcap").topics["/state"]["t"])
    assert kept > 100
    recorder.dump(tmp_path / "box.mcap")
    assert len(read_recording(tmp_path / "box.mcap").topics["/state"]["t"]) == 500
    recorder.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_from_the_start_is_told_of(tmp_path):
    recorder = Recorder("/dev/full", DTYPE, HEADER, rate=1000.0)
    with pytest.raises(SpecError, match="/dev/full: .*[Nn]o space"):
        recorder.open()


def test_a_file_that_cannot_be_made_is_told_of(tmp_path):
    with pytest.raises(SpecError, match="no/log.mcap: cannot be written: No such file"):
        Recorder(tmp_path / "no" / "log.mcap", DTYPE, HEADER, rate=1000.0).open()


def test_a_log_process_that_hangs_is_told_of(opened, monkeypatch):
    recorder = opened()
    monkeypatch.setattr(module, "_SILENCE", 0.2)
    os.kill(recorder._process.pid, signal.SIGSTOP)
    wait_for(lambda: "not answered" in recorder.trouble)
    assert not recorder.healthy
    os.kill(recorder._process.pid, signal.SIGCONT)
    monkeypatch.setattr(module, "_SILENCE", 30.0)
    wait_for(lambda: recorder.healthy)  # it was only late


CONTROL = """
import sys, time
from pathlib import Path
import test_recorder as t
if __name__ == "__main__":
    recorder = t.Recorder(Path(sys.argv[1]) / "log.mcap", t.DTYPE, t.HEADER, rate=1000.0)
    recorder.open()
    for n in range(700):
        recorder.put(t.record(n))
    print(recorder._process.pid, recorder._records.path.parent, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_log_is_whole_when_the_control_process_dies(tmp_path, end):
    script = tmp_path / "control.py"
    script.write_text(CONTROL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    control = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    with control:
        pid, folder = control.stdout.readline().split()
        control.send_signal(end)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() and not Path(folder).exists())
    recording = read_recording(tmp_path / "log.mcap")
    check(recording, range(700))
    assert recording.whole


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_log_cut_off_anywhere_is_read_up_to_there(tmp_path, share):
    made(tmp_path / "log.mcap", 1000)
    data = (tmp_path / "log.mcap").read_bytes()
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(data[: int(share * len(data))])
    if share < 0.01:
        with pytest.raises(SpecError, match="cut.mcap: is n"):
            read_recording(cut)
        return
    recording = read_recording(cut)
    assert not recording.whole and 0.8 * share * 1000 - 50 <= len(recording.topics["/state"]["t"]) <= 1000


def test_a_damaged_log_shows_no_damaged_number(tmp_path):
    made(tmp_path / "log.mcap", 1000)
    data = bytearray((tmp_path / "log.mcap").read_bytes())
    for where in range(len(data) // 2, len(data), 997):
        data[where] ^= 16
    (tmp_path / "log.mcap").write_bytes(data)
    recording = read_recording(tmp_path / "log.mcap")
    kept = len(recording.topics["/state"]["t"])
    assert 100 < kept < 1000 and not recording.whole
    for topic, names in (("/state", ("q", "v", "tau")), ("/command", ("q_ref", "torque"))):  # a chunk may end within a record
        for name in names:
            column = recording.topics[topic][name]
            assert abs(len(column) - kept) <= 1 and np.array_equal(column, [record(n)[name] for n in range(len(column))])


def test_what_is_no_log_is_told_of(tmp_path):
    (tmp_path / "x.mcap").write_text("hello, this is no log")
    with pytest.raises(SpecError, match="not an MCAP file"):
        read_recording(tmp_path / "x.mcap")
    with pytest.raises(SpecError, match="No such file"):
        read_recording(tmp_path / "y.mcap")


def test_replay_shows_what_happened(opened, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import io

    from rich.console import Console

    from mbctrl.cli import replay as verb

    recorder = opened()
    for n in range(900):
        one = record(n)
        one["q"], one["v"], one["tau"], one["clamped"] = ROBOT.home, 0.0, 0.0, 0
        one["v"][3] = ROBOT.limits.velocity[3] * (1.5 if n == 500 else 0.1)
        recorder.put(one)
    for n in range(20):
        recorder.event(0.4, "error", f"[plan] stale {n}")
    recorder.close()
    shown = io.StringIO()
    monkeypatch.setattr(verb, "console", Console(file=shown, width=150))
    assert verb.replay(tmp_path / "log.mcap") == 0
    text = shown.getvalue()
    for part in ("0.899 s, 900 records", "1000.0 Hz of 1000 Hz", "150% of the limit by joint4", "0 of 900", "8 earlier ones"):
        assert part in text, text
    assert "RUN 0.000 s → HOLD 0.400 s → STOP 0.800 s" in text and "[plan] stale 19" in text and "cut off" not in text
    assert (tmp_path / "plots.png").stat().st_size > 10_000
    (tmp_path / "cut.mcap").write_bytes((tmp_path / "log.mcap").read_bytes()[:60_000])
    assert verb.replay(str(tmp_path / "cut.mcap")) == 0 and "cut off" in shown.getvalue()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert verb.replay(tmp_path / "log.mcap") == 0 and 'pip install "mbctrl[sim]"' in shown.getvalue()
