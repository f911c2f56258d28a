"""A Franka arm's network interface (FCI, protocol version 10) over a simulated robot."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections import deque

import mujoco
import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.runtime.driver import JointCommand, RobotState, Status
from mbctrl.sim import fci
from mbctrl.sim.fci_channel import Channel
from mbctrl.sim.fci_model import urdf
from mbctrl.sim.plant import Plant
from mbctrl.sim.wire import Wire

log = logging.getLogger(__name__)
_JOINTS = 7
_MISSED = 20  # consecutive periods without a command before the robot stops by itself
_HOLDING = 0.3  # [N·m] that hold an arm where it is, beside the torque it adds against gravity
_DATAGRAMS = 64  # read in a period: a flood must not hold up the robot
_ROUNDING = 1e-4  # [N·m], a torque went through single precision on its way to the client
_MODES = {
    Status.PROTECTIVE_STOP: fci.Mode.REFLEX,
    Status.EMERGENCY_STOP: fci.Mode.USER_STOPPED,
    Status.FAULT: fci.Mode.OTHER,
}
_RECOVERY = {
    Status.OK: fci.Recovery.SUCCESS,
    Status.PROTECTIVE_STOP: fci.Recovery.SUCCESS,
    Status.EMERGENCY_STOP: fci.Recovery.SAFETY_FUNCTIONS,
    Status.FAULT: fci.Recovery.MANUAL_REQUIRED,
}


class FrankaWire(Wire):
    """TCP requests, and state and command packets over UDP, one of each a millisecond.

    Motions are torque motions, without the arm's gravity torque; motion generators are refused as invalid. The robot
    stops by itself, with the error the real arm names, when

    - 20 periods in a row bring no command, or the client is gone: ``communication_constraints_violation`` (they must have
      taken 20 periods' time as well: a server that makes up for a pause of its own must not blame the client);
    - a torque is further from the last one than the effort rate allows: ``controller_torque_discontinuity``. A command that
      answers an older state may be a step further for each period it is late; the torque applied still takes one
      step a period, so late packets never make the arm's torque jump;
    - a torque is not finite: the motion is aborted as invalid input.

    Of several commands in a period the newest counts; commands older than one taken, or that answer a state not yet sent,
    are dropped. What configures the arm (collision thresholds, load, impedances, frames) is accepted and without effect.
    """

    def __init__(self, plant: Plant, host: str = "127.0.0.1") -> None:
        super().__init__(plant, host)
        robot = plant.robot
        if robot.nu != _JOINTS or robot.nq != _JOINTS:
            raise DriverError(f"expected {_JOINTS} driven joints, found {robot.nu} of {robot.nq}", file=robot.path, key="joints")
        rate = robot.limits.effort_rate
        self._step = (np.full(_JOINTS, np.inf) if rate is None else np.asarray(rate)) * plant.period
        self._channel, self._udp = Channel(host), None
        self._port: int | None = None  # of the client, once connected
        self._move: fci.Request | None = None  # the motion under way
        self._wanted, self._torque = np.zeros(_JOINTS), np.zeros(_JOINTS)  # commanded, and applied [N·m]
        self._sent, self._taken = 0, 0  # numbers of the newest state and of the newest command
        self._missed, self._heard, self._recent = 0, 0.0, deque(maxlen=100)
        self._moves = False  # the motion under way has asked for more than holding the arm
        self._tool = _Tool(plant)
        self._packet = _blank(self._tool)

    def open(self) -> None:
        """Listen on TCP and UDP port 1337."""
        self._model = urdf(self.plant.mj, self.plant.robot).encode()
        self._channel.open()
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._udp.bind((self.host, fci.PORT))
        except OSError as error:
            self.close()
            reason = f"cannot bind: {error.strerror}; expected a free UDP port"
            raise DriverError(reason, key=f"{self.host}:{fci.PORT}") from None
        self._udp.setblocking(False)

    def receive(self) -> bool:
        """Serve requests, and put the newest torque in force.

        Return whether one came of a motion that moves: a client holds the arm from the moment it connects, for as long as it
        takes to get ready.
        """
        for request in self._channel.poll():
            self._serve(request)
        if self._channel.peer is None and self._port is not None:
            self._gone()
        command = self._newest()
        if self._move is None:
            return False
        self._recent.append(command is not None)
        if command is None:
            self._missed += 1
            if self._missed >= _MISSED and time.monotonic() - self._heard >= _MISSED * self.plant.period:
                self._reflex("communication_constraints_violation")
        else:
            self._missed, self._heard = 0, time.monotonic()
            self._take(command)
        if self._move is not None and self._taken:
            self._apply()
        self._moves |= bool((np.abs(self._torque) > _HOLDING).any())
        return command is not None and self._moves

    def publish(self, sample: RobotState) -> None:
        """Send a state packet; a robot that is not usable ends the motion under way."""
        if self._move is not None and not sample.status.usable:
            self._end(fci.Move.REFLEX if sample.status is Status.PROTECTIVE_STOP else fci.Move.EMERGENCY)
        if self._port is None:
            return
        number = round(sample.stamp * 1000)
        self._fill(sample, number)
        self._sent = max(self._sent, number)
        try:
            self._udp.sendto(self._packet.tobytes(), (self._channel.peer, self._port))
        except OSError as error:  # a full buffer, or nobody there: the watchdog says the rest
            log.debug("state %d not sent: %s", number, error)

    def close(self) -> None:
        """Close every socket."""
        self._channel.close()
        if self._udp is not None:
            self._udp.close()
        self._port = self._move = None

    def _serve(self, request: fci.Request) -> None:
        """Answer a request."""
        if self._port is None and request.command is not fci.Command.CONNECT:
            self._channel.drop()
        elif request.command is fci.Command.CONNECT:
            self._connect(request)
        elif request.command is fci.Command.MOVE:
            self._start(request)
        elif request.command is fci.Command.STOP_MOVE:
            self._channel.send(fci.answer(request, 0))
            self._finish(fci.Move.PREEMPTED)
        elif request.command is fci.Command.AUTOMATIC_ERROR_RECOVERY:
            status = self.plant.status
            self._channel.send(fci.answer(request, _RECOVERY[status]))
            if status is Status.PROTECTIVE_STOP:
                self.plant.reset()
        elif request.command is fci.Command.GET_ROBOT_MODEL:
            self._channel.send(fci.answer(request, 0, self._model))
        else:
            self._channel.send(fci.answer(request, 0))

    def _connect(self, request: fci.Request) -> None:
        if len(request.payload) != fci.CONNECT.size or self._port is not None:
            self._channel.drop()
            return
        version, port = fci.CONNECT.unpack(request.payload)
        fits = version == fci.VERSION and port > 0
        self._channel.send(fci.answer(request, 0 if fits else 1, struct.pack("<H", fci.VERSION)))
        self._port = port if fits else None
        log.info("client %s: version %d, UDP port %d", self._channel.peer, version, port)

    def _start(self, request: fci.Request) -> None:
        if self._move is not None or not self.plant.status.usable:
            self._channel.send(fci.answer(request, fci.Move.NOT_POSSIBLE))
            return
        kinds = fci.MOVE.unpack_from(request.payload) if len(request.payload) >= fci.MOVE.size else None
        if kinds != (fci.EXTERNAL_CONTROLLER, fci.NO_GENERATOR):
            self._channel.send(fci.answer(request, fci.Move.INVALID))
            return
        self._move, self._missed, self._heard, self._taken = request, 0, time.monotonic(), 0
        self._wanted, self._torque, self._moves = np.zeros(_JOINTS), np.zeros(_JOINTS), False
        self._recent.clear()
        self._packet["reflex_reason"] = 0
        self._channel.send(fci.answer(request, fci.Move.STARTED))

    def _newest(self) -> np.void | None:
        """Return the newest command the client sent since the last period, if there is one."""
        newest = None
        try:
            for _ in range(_DATAGRAMS):
                datagram, sender = self._udp.recvfrom(2048)
                if self._move is None or sender != (self._channel.peer, self._port):
                    continue
                command = fci.take_command(datagram)
                if command is not None and self._taken < command["message_id"] <= self._sent:
                    newest, self._taken = command, int(command["message_id"])
        except OSError:  # nothing more to read, or the client's port is closed
            pass
        return newest

    def _take(self, command: np.void) -> None:
        """Check a command, and make it the wanted torque."""
        torque = command["tau_J_d"]
        if command["motion_generation_finished"] or command["torque_command_finished"]:
            self._finish(fci.Move.SUCCESS)
        elif not np.isfinite(torque).all():
            self.plant.halt("torque command not finite")
            self._end(fci.Move.INPUT_ERROR)
        elif (np.abs(torque - self._torque) > self._step * (1 + self._sent - self._taken) + _ROUNDING).any():
            self._reflex("controller_torque_discontinuity")
        else:
            self._wanted = torque

    def _apply(self) -> None:
        self._torque = self._wanted.clip(self._torque - self._step, self._torque + self._step)
        zero = np.zeros(_JOINTS)
        self.plant.command(JointCommand(zero, zero, zero, zero, self._torque))

    def _reflex(self, reason: str) -> None:
        self.plant.halt(reason)
        self._end(fci.Move.REFLEX)

    def _finish(self, status: fci.Move) -> None:
        """End the motion under way because the client wants it; the arm brakes and holds."""
        if self._move is not None:
            self.plant.release()
            self._end(status)

    def _end(self, status: fci.Move) -> None:
        """Tell the client how its motion ended."""
        move, self._move = self._move, None
        self._torque = np.zeros(_JOINTS)
        if status not in (fci.Move.SUCCESS, fci.Move.PREEMPTED):
            self._packet["reflex_reason"] = _errors(self.plant.reason)
            log.warning("motion aborted: %s", self.plant.reason or status.name)
        self._channel.send(fci.answer(move, status))

    def _gone(self) -> None:
        """The client has closed its connection, or died."""
        self._port = None
        if self._move is not None:
            self._reflex("communication_constraints_violation")

    def _fill(self, sample: RobotState, number: int) -> None:
        packet = self._packet
        packet["message_id"] = number
        packet["q"] = packet["q_d"] = packet["theta"] = sample.q
        packet["dq"] = packet["dq_d"] = packet["dtheta"] = sample.v
        packet["tau_J"], packet["tau_J_d"] = sample.tau, self._torque
        packet["O_T_EE"] = packet["O_T_EE_d"] = packet["O_T_EE_c"] = self._tool.at(sample.q)
        moving, usable = self._move is not None, sample.status.usable
        packet["motion_generator_mode"] = fci.NO_GENERATOR + 1 if moving else 0
        packet["controller_mode"] = fci.EXTERNAL_CONTROLLER if moving else fci.IDLE_CONTROLLER
        packet["robot_mode"] = _MODES.get(sample.status, fci.Mode.MOVE if moving else fci.Mode.IDLE)
        packet["errors"] = 0 if usable else _errors(self.plant.reason)
        packet["control_command_success_rate"] = sum(self._recent) / len(self._recent) if moving and self._recent else 0.0


class _Tool:
    """Where the tool is, column-major as the protocol has it; ``on_flange`` is its place on the last link."""

    def __init__(self, plant: Plant) -> None:
        self._mj, self._data = plant.mj, mujoco.MjData(plant.mj)
        self._site = mujoco.mj_name2id(plant.mj, mujoco.mjtObj.mjOBJ_SITE, plant.robot.tool)
        self._body = mujoco.mj_name2id(plant.mj, mujoco.mjtObj.mjOBJ_BODY, plant.robot.tool)
        place = self.at(np.asarray(plant.robot.home)).reshape(4, 4).T
        last = plant.mj.joint(plant.robot.driven[-1]).id
        body = plant.mj.jnt_bodyid[last]
        flange = _transform(self._data.xpos[body], self._data.xmat[body])
        self.on_flange = (np.linalg.inv(flange) @ place).ravel("F")

    def at(self, q: np.ndarray) -> np.ndarray:
        """Return the tool's pose (16,) at ``q`` (7,) [rad]."""
        self._data.qpos[:] = q
        mujoco.mj_kinematics(self._mj, self._data)
        if self._site >= 0:
            return _transform(self._data.site_xpos[self._site], self._data.site_xmat[self._site]).ravel("F")
        return _transform(self._data.xpos[self._body], self._data.xmat[self._body]).ravel("F")


def _transform(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation.reshape(3, 3), position
    return transform


def _blank(tool: _Tool) -> np.ndarray:
    """Return a state packet () of an arm without a load."""
    packet = np.zeros((), fci.STATE)
    for name in fci.TRANSFORMS:
        packet[name] = np.eye(4).ravel()
    packet["F_T_EE"] = packet["F_T_NE"] = tool.on_flange
    packet["O_ddP_O"] = (0.0, 0.0, -9.81)
    return packet


def _errors(reason: str) -> np.ndarray:
    """Return the errors' flags (41,); a stop for a reason the protocol does not have counts as a joint reflex."""
    flags = np.zeros(fci.STATE["errors"].shape, np.uint8)
    flags[fci.ERRORS.get(reason, fci.ERRORS["joint_reflex"])] = 1
    return flags
