"""A simulated Franka arm behind its real protocol, in a process of its own: ``python _franka_server.py HOST LOG``.

A line on standard input is an order: ``freeze SECONDS``, ``estop``, ``protective``, ``fault``, ``reset``, ``nan``, ``quit``. The
log has a line a period: its number, fastest joint [rad/s], status, and why the arm stopped.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import time
from dataclasses import replace

import mujoco
import numpy as np

from mbctrl.base.robot import load_robot
from mbctrl.runtime.driver import Status
from mbctrl.sim.franka_wire import FrankaWire
from mbctrl.sim.plant import Plant


def serve(host: str, path: str) -> None:
    robot = load_robot("panda")
    plant = Plant(mujoco.MjModel.from_xml_path(robot.model_path), robot)
    wire = FrankaWire(plant, host)
    wire.open()
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    orders = selectors.DefaultSelector()
    orders.register(sys.stdin, selectors.EVENT_READ)
    print("ready", flush=True)
    loop(plant, wire, orders, path)


def loop(plant: Plant, wire: FrankaWire, orders: selectors.BaseSelector, path: str) -> None:
    stops = {"estop": Status.EMERGENCY_STOP, "protective": Status.PROTECTIVE_STOP, "fault": Status.FAULT}
    frozen_until = poisoned_until = 0
    due, busy = time.monotonic(), 0.0
    with open(path, "w", buffering=1, encoding="utf-8") as log:
        while True:
            due += plant.period
            time.sleep(max(due - time.monotonic(), 0.0))
            begin = time.thread_time()
            if plant.ticks % 10 == 0 and orders.select(0):
                order, *arguments = sys.stdin.readline().split() or ["quit"]
                if order == "quit":
                    break
                if order in stops:
                    plant.halt(order, stops[order])
                elif order == "reset":
                    plant.reset()
                elif order == "freeze":
                    frozen_until = plant.ticks + round(float(arguments[0]) / plant.period)
                elif order == "nan":
                    poisoned_until = plant.ticks + 3
            if frozen := plant.ticks < frozen_until:
                plant.tick()
            else:
                wire.receive()
                sample = plant.tick()
                wire.publish(replace(sample, q=np.full(7, np.nan)) if plant.ticks <= poisoned_until else sample)
            busy += time.thread_time() - begin
            speed = np.abs(plant.state.v).max()
            log.write(f"{plant.ticks} {speed:.6f} {plant.status.name} {plant.reason or '-'}{' frozen' if frozen else ''}\n")
    print(f"{1e6 * busy / plant.ticks:.0f} us a period", flush=True)
    wire.close()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
