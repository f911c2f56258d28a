"""Mailboxes and rings between processes: nothing torn, nothing waits, and any side may be killed at any time."""

from __future__ import annotations

import multiprocessing
import os
import stat
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.errors import DriverError
from mbctrl.runtime.shared import Mailbox, Ring, private_folder

WIDE = np.dtype((np.float64, 200))
MIXED = np.dtype([("t", "f8"), ("seq", "i8"), ("q", "f8", (7,)), ("mode", "u1")])
ONE = np.dtype([("n", "u8")])


def hammer_mailbox(path):
    box = Mailbox(path, WIDE)
    start = 0 if (got := box.read()) is None else int(got[1][0])
    while True:
        start += 1
        box.write(np.full(200, float(start)))


def hammer_ring(path):
    ring = Ring(path, 64, WIDE)
    n = 0
    while True:
        n += ring.put(np.full(200, float(n)))


def drain_ring(path):
    ring = Ring(path, 64, WIDE)
    while True:
        ring.drain()


def started(work, *args):
    process = multiprocessing.get_context("spawn").Process(target=work, args=args, daemon=True)
    process.start()
    return process


def killed(process):
    process.kill()
    process.join(10)
    assert not process.is_alive()


def test_a_reader_beside_a_hammering_writer_sees_no_torn_record_and_survives_its_death(tmp_path):
    box, last, writers = Mailbox(tmp_path / "box", WIDE), (0, 0.0), 0
    assert box.read() is None
    for _ in range(3):  # each writer goes on where the killed one left off
        process, reads, deadline = started(hammer_mailbox, tmp_path / "box"), 0, time.monotonic() + 60
        while reads < 20_000 and time.monotonic() < deadline:
            if (got := box.read()) is None or got[0] == last[0]:
                continue
            number, record = got
            assert (record == record[0]).all() and number > last[0] and record[0] > last[1]
            last, reads = (number, record[0]), reads + 1
        killed(process)
        number, record = box.read()  # whatever it was doing, its last whole record is there
        assert number >= last[0] and (record == record[0]).all()
        last, writers = (number, record[0]), writers + 1
        assert reads > 100
    assert writers == 3


def test_a_ring_beside_a_hammering_writer_keeps_order_and_counts_what_did_not_fit(tmp_path):
    ring, expected = Ring(tmp_path / "ring", 64, WIDE), 0
    process, deadline = started(hammer_ring, tmp_path / "ring"), time.monotonic() + 60
    while expected < 20_000 and time.monotonic() < deadline:
        for record in ring.drain():
            assert (record == expected).all()
            expected += 1
    killed(process)
    for record in ring.drain():
        assert (record == expected).all()
        expected += 1
    assert expected > 1000 and ring.torn == 0 and len(ring) == 0


def test_a_ring_outlives_its_reader(tmp_path):
    ring = Ring(tmp_path / "ring", 64, WIDE)
    process, n, deadline = started(drain_ring, tmp_path / "ring"), 0, time.monotonic() + 60
    while n < 1000 and time.monotonic() < deadline:
        n += ring.put(np.full(200, float(n)))
    killed(process)
    before = ring.lost
    for _ in range(65):
        n += ring.put(np.full(200, float(n)))
        if ring.lost > before:
            break
    assert n >= 1000 and ring.lost == before + 1 and len(ring) == 64
    assert [record[0] for record in Ring(tmp_path / "ring", 64, WIDE).drain()] == list(range(n - 64, n))  # another takes over


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just("put"), st.integers(0, 9)), max_size=60), st.integers(1, 6))
def test_a_ring_is_a_bounded_queue(steps, room):
    folder = private_folder()
    try:
        ring, model, lost, n = Ring(folder / "ring", room, ONE), [], 0, 0
        for step in steps:
            if step == "put":
                fits = len(model) < room
                assert ring.put(np.array((n,), ONE)) == fits
                model, lost, n = model + [n] * fits, lost + (not fits), n + 1
            else:
                assert ring.drain(step)["n"].tolist() == model[:step]
                model = model[step:]
            assert (len(ring), ring.lost) == (len(model), lost)
        ring.close()
    finally:
        remove(folder)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=MIXED.itemsize, max_size=MIXED.itemsize), min_size=1, max_size=8))
def test_a_mailbox_gives_back_the_newest_bit_for_bit(records):
    folder = private_folder()
    try:
        writer, reader = Mailbox(folder / "box", MIXED), Mailbox(folder / "box", MIXED)
        for i, record in enumerate(records, 1):
            assert writer.write(record) == i == reader.number
            number, copy = reader.read()
            assert number == i and copy.tobytes() == record == reader.read()[1].tobytes()
    finally:
        remove(folder)


def test_a_record_is_the_readers_own_copy(tmp_path):
    box = Mailbox(tmp_path / "box", MIXED)
    record = np.zeros((), MIXED)
    record["q"], record["seq"] = np.arange(7), 5
    box.write(record)
    _, first = box.read()
    record["q"] = 9
    box.write(record)
    assert first["q"].tolist() == list(range(7)) and first["seq"] == 5
    first["q"][0] = 3  # and may be written to
    assert box.read()[1]["q"].tolist() == [9] * 7


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_planted_torn_record_is_not_shown(tmp_path):
    box = Mailbox(tmp_path / "box", WIDE)
    box.write(np.full(200, 1.0))
    box.write(np.full(200, 2.0))  # into slot 0
    flip(tmp_path / "box", 64 + 8 + 100)
    assert (box.read()[1] == 1.0).all()
    box.write(np.full(200, 3.0))
    assert (box.read()[1] == 3.0).all()
    ring = Ring(tmp_path / "ring", 4, WIDE)
    for n in range(3):
        ring.put(np.full(200, float(n)))
    flip(tmp_path / "ring", 64 + (8 + 1600) + 8 + 77)
    assert [record[0] for record in ring.drain()] == [0.0, 2.0] and ring.torn == 1


def test_files_are_private_and_of_one_kind(tmp_path):
    folder = private_folder()
    try:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        Mailbox(folder / "box", WIDE)
        assert stat.S_IMODE(os.stat(folder / "box").st_mode) == 0o600
        with pytest.raises(DriverError, match="box: has .* bytes, expected"):
            Mailbox(folder / "box", ONE)
        with pytest.raises(DriverError, match="cannot be opened"):
            Mailbox(folder / "no" / "box", ONE)
    finally:
        remove(folder)
    box = Mailbox(tmp_path / "box", ONE)
    with pytest.raises(ValueError, match="8 bytes, found 16"):
        box.write(bytes(16))
    with pytest.raises(ValueError, match="at least 1"):
        Ring(tmp_path / "ring", 0, ONE)


def test_a_full_disk_is_found_when_the_file_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DriverError, match="box: no room for .* No space left"):
        Mailbox(tmp_path / "box", ONE)


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
