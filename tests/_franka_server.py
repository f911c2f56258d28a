"""A simulated Franka arm behind its real protocol, in a process of its own: ``python _franka_server.py HOST LOG``.

A line on standard input is an order: ``freeze S``, ``estop``, ``protective``, ``reset``, ``nan``, ``torque``, ``quit``. The
log has a line a period: robot time, fastest joint [rad/s], status, largest torque step [N·m], largest torque over its limit.
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
    limit, last, until, poison = np.asarray(plant.robot.limits.effort), plant.state.tau - plant.state.gravity, 0, 0
    due, busy = time.monotonic(), 0.0
    with open(path, "w", buffering=1) as log:
        while True:
            due += plant.period
            time.sleep(max(due - time.monotonic(), 0.0))
            begin = time.thread_time()
            if plant.ticks % 10 == 0 and orders.select(0):
                order = sys.stdin.readline().split()
                if not order or order[0] == "quit":
                    break
                if order[0] == "freeze":
                    until = plant.ticks + round(float(order[1]) / plant.period)
                elif order[0] == "estop":
                    plant.halt("emergency stop", Status.EMERGENCY_STOP)
                elif order[0] == "protective":
                    plant.halt("joint_reflex")
                elif order[0] == "reset":
                    plant.reset()
                elif order[0] == "nan":
                    poison = 3
            frozen = plant.ticks < until
            if not frozen:
                wire.receive()
            sample = plant.tick()
            if poison:
                poison, sample = poison - 1, replace(sample, q=np.full(7, np.nan))
            if not frozen:
                wire.publish(sample)
            busy += time.thread_time() - begin
            command = plant.state.tau - plant.state.gravity
            step, over = np.abs(command - last).max(), (np.abs(plant.state.tau) - limit).max()
            last = command
            log.write(f"{plant.ticks} {np.abs(plant.state.v).max():.6f} {plant.status.name} {step:.4f} {over:.4f}\n")
    print(f"busy {1e6 * busy / plant.ticks:.0f} us a period", flush=True)
    wire.close()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
