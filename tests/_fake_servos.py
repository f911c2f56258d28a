"""Dynamixel X-series servos on a pseudo-terminal: protocol 2.0 as ROBOTIS's e-Manual has it, and faults on request."""

from __future__ import annotations

import os
import pty
import select
import threading
import tty

HEADER = b"\xff\xff\xfd\x00"


def crc16(data: bytes) -> int:
    """CRC-16, polynomial 0x8005, from 0."""
    value = 0
    for byte in data:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1 ^ 0x8005 if value & 0x8000 else value << 1) & 0xFFFF
    return value


def packet(number: int, body: bytes) -> bytes:
    """Frame an instruction or status, with byte stuffing."""
    body = body.replace(b"\xff\xff\xfd", b"\xff\xff\xfd\xfd")
    head = HEADER + bytes([number]) + (len(body) + 2).to_bytes(2, "little") + body
    return head + crc16(head).to_bytes(2, "little")


class Servos:
    """A bus; ``memory[id]`` is a servo's control table, ``silent``, ``corrupt`` and ``alarm`` are sets of ids."""

    def __init__(self, ids) -> None:
        self.memory = {number: bytearray(256) for number in ids}
        for number in ids:
            self.put(number, 11, 3, 1)  # operating mode: position
            self.put(number, 48, 4095, 4)
            self.put(number, 52, 0, 4)
            self.put(number, 132, 2048, 4)
        self.silent, self.corrupt, self.alarm = set(), set(), set()
        self.once = False  # a fault that passes after one answer
        self.writes: list[tuple[int, int, int]] = []  # id, address, value
        self._master, slave = pty.openpty()
        tty.setraw(slave)
        self.device, self._slave = os.ttyname(slave), slave
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._running = True
        self._thread.start()

    def put(self, number: int, address: int, value: int, size: int) -> None:
        self.memory[number][address : address + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def get(self, number: int, address: int, size: int) -> int:
        return int.from_bytes(self.memory[number][address : address + size], "little", signed=size == 4)

    def unplug(self) -> None:
        """Take the adapter away."""
        self._running = False
        self._thread.join(5)
        for descriptor in (self._slave, self._master):
            if descriptor is not None:
                os.close(descriptor)
        self._slave = self._master = None

    def _run(self) -> None:
        data = b""
        while self._running:
            if not select.select([self._master], [], [], 0.02)[0]:
                continue
            data += os.read(self._master, 4096)
            while (start := data.find(HEADER)) >= 0 and len(data) >= start + 7:
                end = start + 7 + int.from_bytes(data[start + 5 : start + 7], "little")
                if len(data) < end:
                    break
                whole, data = data[start:end], data[end:]
                assert crc16(whole[:-2]) == int.from_bytes(whole[-2:], "little")
                self._obey(whole[4], whole[7], whole[8:-2].replace(b"\xff\xff\xfd\xfd", b"\xff\xff\xfd"))

    def _obey(self, number: int, instruction: int, given: bytes) -> None:
        word = int.from_bytes(given[:2], "little")
        if instruction == 0x83:  # sync write: address, size, (id, data)…
            size = int.from_bytes(given[2:4], "little")
            for at in range(4, len(given), size + 1):
                self._store(given[at], word, given[at + 1 : at + 1 + size])
        elif instruction == 0x82:  # sync read: address, size, ids
            size = int.from_bytes(given[2:4], "little")
            for one in given[4:]:
                self._answer(one, self.memory[one][word : word + size])
        elif number in self.memory and instruction == 2:
            self._answer(number, self.memory[number][word : word + int.from_bytes(given[2:4], "little")])
        elif number in self.memory and instruction == 3:
            self._answer(number, b"", error=0 if self._store(number, word, given[2:]) else 7)

    def _store(self, number: int, address: int, data: bytes) -> bool:
        if number in self.silent:
            return False
        self.writes.append((number, address, int.from_bytes(data, "little", signed=len(data) == 4)))
        if address == 116 and self.memory[number][98] == 0xFF:  # its watchdog has gone off
            return False
        self.memory[number][address : address + len(data)] = data
        if self.memory[number][64]:  # torque on: it moves, at once
            self.memory[number][132:136] = self.memory[number][116:120]
        return True

    def _answer(self, number: int, data: bytes, error: int = 0) -> None:
        if number in self.silent:
            self.silent -= {number} if self.once else set()
            return
        answer = packet(number, bytes([0x55, error | (0x80 if number in self.alarm else 0)]) + data)
        if number in self.corrupt:
            self.corrupt -= {number} if self.once else set()
            answer = answer[:-3] + bytes([answer[-3] ^ 1]) + answer[-2:]
        os.write(self._master, answer)
