"""RTDE, the real-time data exchange of Universal Robots' controllers, protocol version 2: framing, variables, recipes.

Source: Universal Robots, "Real-Time Data Exchange (RTDE) Guide". Everything is big-endian; a message is its own length
(2 bytes, header included), its kind (1 byte) and a payload.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from mbctrl.base.errors import DriverError

PROTOCOL = 2
NUMBER_OF_REGISTERS = 48
_HEADER = struct.Struct(">HB")


class Kind(IntEnum):
    """What a message is, the letter of its code in the guide."""

    VERSION = ord("V")
    CONTROLLER = ord("v")
    TEXT = ord("M")
    DATA = ord("U")
    OUTPUTS = ord("O")
    INPUTS = ord("I")
    START = ord("S")
    PAUSE = ord("P")


# For each type its format of struct, and how many numbers it has.
TYPES = {
    "UINT8": ("B", 1),
    "UINT32": ("I", 1),
    "UINT64": ("Q", 1),
    "INT32": ("i", 1),
    "DOUBLE": ("d", 1),
    "VECTOR3D": ("3d", 3),
    "VECTOR6D": ("6d", 6),
    "VECTOR6INT32": ("6i", 6),
}
_JOINTS = (
    "target_q target_qd target_qdd target_current target_moment actual_q actual_qd actual_qdd actual_current "
    "actual_current_as_torque joint_control_output actual_TCP_pose actual_TCP_speed actual_TCP_force target_TCP_pose "
    "target_TCP_speed joint_temperatures actual_joint_voltage ft_raw_wrench payload_inertia"
)
_NUMBERS = (
    "timestamp actual_execution_time speed_scaling target_speed_fraction actual_momentum actual_main_voltage actual_robot_voltage "
    "actual_robot_current standard_analog_input0 standard_analog_input1 standard_analog_output0 standard_analog_output1 payload"
)
OUTPUTS = {
    **dict.fromkeys(_JOINTS.split(), "VECTOR6D"),
    **dict.fromkeys(_NUMBERS.split(), "DOUBLE"),
    **dict.fromkeys(("actual_tool_accelerometer", "payload_cog"), "VECTOR3D"),
    **dict.fromkeys(("robot_mode", "safety_mode"), "INT32"),
    "joint_mode": "VECTOR6INT32",
    **dict.fromkeys(("runtime_state", "robot_status_bits", "safety_status_bits"), "UINT32"),
    **dict.fromkeys(("output_bit_registers0_to_31", "output_bit_registers32_to_63"), "UINT32"),
    **dict.fromkeys(("actual_digital_input_bits", "actual_digital_output_bits"), "UINT64"),
    **{f"output_int_register_{index}": "INT32" for index in range(NUMBER_OF_REGISTERS)},
    **{f"output_double_register_{index}": "DOUBLE" for index in range(NUMBER_OF_REGISTERS)},
}
INPUTS = {
    **{f"input_int_register_{index}": "INT32" for index in range(NUMBER_OF_REGISTERS)},
    **{f"input_double_register_{index}": "DOUBLE" for index in range(NUMBER_OF_REGISTERS)},
    "external_force_torque": "VECTOR6D",
    "speed_slider_mask": "UINT32",
    "speed_slider_fraction": "DOUBLE",
    **dict.fromkeys(("standard_digital_output_mask", "standard_digital_output"), "UINT8"),
    **dict.fromkeys(("configurable_digital_output_mask", "configurable_digital_output"), "UINT8"),
    **dict.fromkeys(("tool_digital_output_mask", "tool_digital_output"), "UINT8"),
    **dict.fromkeys(("standard_analog_output_mask", "standard_analog_output_type"), "UINT8"),
    **dict.fromkeys(("standard_analog_output_0", "standard_analog_output_1"), "DOUBLE"),
}


def message(kind: Kind, payload: bytes = b"") -> bytes:
    """Return a whole message."""
    return _HEADER.pack(_HEADER.size + len(payload), kind) + payload


def split(stream: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Cut a stream into (kind, payload) messages; return them and what is left of an unfinished one.

    Errors:
        DriverError: a length that is shorter than the header: nothing after it can be told apart.
    """
    found, start = [], 0
    while len(stream) - start >= _HEADER.size:
        length, kind = _HEADER.unpack_from(stream, start)
        if length < _HEADER.size:
            raise DriverError(f"a message of {length} bytes, expected at least {_HEADER.size}", key="RTDE")
        if len(stream) - start < length:
            break
        found.append((kind, stream[start + _HEADER.size : start + length]))
        start += length
    return found, stream[start:]


@dataclass(frozen=True)
class Recipe:
    """The variables of a data package, in order; ``number`` is how packages name it."""

    number: int
    names: tuple[str, ...]
    types: tuple[str, ...]

    @cached_property
    def layout(self) -> struct.Struct:
        """The package's payload, the recipe's number included."""
        return struct.Struct(">B" + "".join(TYPES[kind][0] for kind in self.types))

    @cached_property
    def widths(self) -> list[int]:
        """How many numbers each variable has."""
        return [TYPES[kind][1] for kind in self.types]

    def pack(self, values: Sequence[float]) -> bytes:
        """Return the data package of the variables' numbers, one after another."""
        return message(Kind.DATA, self.layout.pack(self.number, *values))

    def unpack(self, payload: bytes) -> dict[str, tuple[float, ...]]:
        """Return each variable's numbers.

        Errors:
            DriverError: a payload of another length.
        """
        layout = self.layout
        if len(payload) != layout.size:
            raise DriverError(f"a data package of {len(payload)} bytes, expected {layout.size}", key=f"RTDE recipe {self.number}")
        numbers, found, start = layout.unpack(payload)[1:], {}, 0
        for name, width in zip(self.names, self.widths):
            found[name] = numbers[start : start + width]
            start += width
        return found
