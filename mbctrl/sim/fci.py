"""The Franka Control Interface on the wire, protocol version 10: packed little-endian messages over TCP and UDP.

Layouts after Franka's published headers (libfranka-common, research_interface/robot: rbk_types.h, service_types.h), sizes,
the accelerometers and the order of the errors as the vendor's client 0.21.3 takes them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from mbctrl.base.errors import DriverError

VERSION = 10
PORT = 1337
MAX_REQUEST = 4096  # [bytes], several times the longest
HEADER = struct.Struct("<III")  # command, the client's number for it, length of the whole message [bytes]
CONNECT = struct.Struct("<HH")  # version, the UDP port the client listens on
MOVE = struct.Struct("<II")  # controller, motion generator; what follows serves Cartesian motions

_FIELDS = (
    ("O_T_EE", 16), ("O_T_EE_d", 16), ("F_T_EE", 16), ("EE_T_K", 16), ("F_T_NE", 16), ("NE_T_EE", 16),
    ("m_ee", 1), ("I_ee", 9), ("F_x_Cee", 3), ("m_load", 1), ("I_load", 9), ("F_x_Cload", 3), ("elbow", 2), ("elbow_d", 2),
    ("tau_J", 7), ("tau_J_d", 7), ("dtau_J", 7), ("q", 7), ("q_d", 7), ("dq", 7), ("dq_d", 7), ("ddq_d", 7),
    ("joint_contact", 7), ("cartesian_contact", 6), ("joint_collision", 7), ("cartesian_collision", 6),
    ("tau_ext_hat_filtered", 7), ("O_F_ext_hat_K", 6), ("K_F_ext_hat_K", 6), ("O_dP_EE_d", 6), ("O_ddP_O", 3),
    ("elbow_c", 2), ("delbow_c", 2), ("ddelbow_c", 2), ("O_T_EE_c", 16), ("O_dP_EE_c", 6), ("O_ddP_EE_c", 6),
    ("theta", 7), ("dtheta", 7), ("accelerometer_top", 18), ("accelerometer_bottom", 18),
)  # fmt: skip
TRANSFORMS = ("O_T_EE", "O_T_EE_d", "F_T_EE", "EE_T_K", "F_T_NE", "NE_T_EE", "O_T_EE_c")  # column-major 4 x 4

ERRORS = {"joint_reflex": 6, "communication_constraints_violation": 25, "controller_torque_discontinuity": 32}
"""Where the errors this side raises stand among the 41."""

STATE = np.dtype(
    [("message_id", "<u8"), *((name, "<f4", (length,)) for name, length in _FIELDS)]
    + [("motion_generator_mode", "u1"), ("controller_mode", "u1"), ("errors", "u1", (41,)), ("reflex_reason", "u1", (41,))]
    + [("robot_mode", "u1"), ("control_command_success_rate", "<f4")]
)
"""A state packet, robot to client; ``message_id`` is the robot's time [ms]; [rad], [rad/s], [N·m], [m]."""

COMMAND = np.dtype(
    [("message_id", "<u8"), ("q_c", "<f8", (7,)), ("dq_c", "<f8", (7,)), ("O_T_EE_c", "<f8", (16,)), ("O_dP_EE_c", "<f8", (6,))]
    + [("elbow_c", "<f8", (2,)), ("valid_elbow", "u1"), ("motion_generation_finished", "u1")]
    + [("tau_J_d", "<f8", (7,)), ("torque_command_finished", "u1")]
)
"""A command packet, client to robot; ``message_id`` is that of the state it answers, ``tau_J_d`` is without gravity [N·m]."""


class Command(IntEnum):
    """What a client asks for over TCP."""

    CONNECT = 0
    MOVE = 1
    STOP_MOVE = 2
    SET_COLLISION_BEHAVIOR = 3
    SET_JOINT_IMPEDANCE = 4
    SET_CARTESIAN_IMPEDANCE = 5
    SET_GUIDING_MODE = 6
    SET_EE_TO_K = 7
    SET_NE_TO_EE = 8
    SET_LOAD = 9
    AUTOMATIC_ERROR_RECOVERY = 10
    GET_ROBOT_MODEL = 11


class Move(IntEnum):
    """Answers to a Move; STARTED is followed by a second answer when the motion ends."""

    SUCCESS = 0
    STARTED = 1
    PREEMPTED = 2
    NOT_POSSIBLE = 5
    INVALID = 7
    REFLEX = 8
    EMERGENCY = 9
    INPUT_ERROR = 10


class Recovery(IntEnum):
    """Answers to an automatic error recovery."""

    SUCCESS = 0
    SAFETY_FUNCTIONS = 2
    MANUAL_REQUIRED = 3


class Mode(IntEnum):
    """What the robot does."""

    OTHER = 0
    IDLE = 1
    MOVE = 2
    GUIDING = 3
    REFLEX = 4
    USER_STOPPED = 5
    RECOVERY = 6


EXTERNAL_CONTROLLER = 2  # the client commands torques
IDLE_CONTROLLER = 3
NO_GENERATOR = 4  # of a Move; in a state packet every generator is one more, 0 being idle


@dataclass(frozen=True)
class Request:
    """One message of a client; ``payload`` is what follows the header."""

    command: Command
    number: int
    payload: bytes


def take_request(buffer: bytearray) -> Request | None:
    """Take the first whole request off ``buffer``; None if it is not all there.

    Errors:
        DriverError: where no request begins.
    """
    if len(buffer) < HEADER.size:
        return None
    command, number, size = HEADER.unpack_from(buffer)
    if command not in Command._value2member_map_ or not HEADER.size <= size <= MAX_REQUEST:
        raise DriverError(f"command {command} of {size} bytes; expected 0 to 11, and 12 to {MAX_REQUEST} bytes", key="FCI")
    if len(buffer) < size:
        return None
    payload = bytes(buffer[HEADER.size : size])
    del buffer[:size]
    return Request(Command(command), number, payload)


def answer(request: Request, status: int, rest: bytes = b"") -> bytes:
    """Return the answer to ``request``: its header, a status, and what else belongs to it."""
    return HEADER.pack(request.command, request.number, HEADER.size + 1 + len(rest)) + bytes([status]) + rest


def take_command(datagram: bytes) -> np.void | None:
    """Return a datagram as a COMMAND record; None if it is none."""
    return np.frombuffer(datagram, COMMAND)[0] if len(datagram) == COMMAND.itemsize else None
