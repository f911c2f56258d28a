"""A UR wire over a plant in a process of its own: ``python tests/_ur_server.py HOST``; the client's constructor holds the GIL.

Takes one word a line on standard input (emergency, protective, reset, freeze, thaw, nan, quit, log) and answers with one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time

from mbctrl.dynamics.load import load_model
from mbctrl.runtime.driver import Status
from mbctrl.sim.plant import Plant
from mbctrl.sim.ur_wire import UrWire


def heard() -> str:
    """Return what came on standard input; "quit" at its end."""
    try:
        return os.read(sys.stdin.fileno(), 4096).decode() or "quit"
    except BlockingIOError:
        return ""


def main() -> None:
    model = load_model("ur10e")
    plant = Plant(model.mj, model.robot)
    wire = UrWire(plant, sys.argv[1])
    wire.open()
    os.set_blocking(sys.stdin.fileno(), False)
    print(json.dumps({"ready": wire.ports}), flush=True)
    rows, frozen, cost, start = [], False, [], time.monotonic()
    while True:
        for word in heard().split():
            answer: object = word
            if word == "quit":
                wire.close()
                return
            if word == "emergency":
                plant.halt("test", Status.EMERGENCY_STOP)
            elif word == "protective":
                plant.halt("test")
            elif word == "reset":
                plant.reset()
            elif word in ("freeze", "thaw"):
                frozen = word == "freeze"
            elif word == "log":
                answer = {"rows": rows, "status": plant.status.value, "reason": plant.reason, "cost": sorted(cost)}
                rows, cost = [], []
            print(json.dumps(answer), flush=True)
        if frozen:
            time.sleep(plant.period)
            continue
        t0 = time.thread_time()
        came = wire.receive()
        t1 = time.thread_time()
        sample = plant.tick()
        t2 = time.thread_time()
        wire.publish(sample)
        cost.append((t1 - t0) + (time.thread_time() - t2))
        rows.append([sample.stamp, time.monotonic(), came, sample.q.tolist(), sample.v.tolist(), wire.script.target.tolist()])
        time.sleep(max(start + plant.ticks * plant.period - time.monotonic(), 0.0))


if __name__ == "__main__":
    main()
