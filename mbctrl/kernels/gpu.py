"""Compiles CUDA C with NVRTC, loads it and launches it on a GPU. Compiling needs no GPU and no CUDA toolkit."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import ModelError
from mbctrl.kernels.cache import cache_folder, read, write
from mbctrl.kernels.cuda import BLOCK, COUNTS, SLOTS, required, source
from mbctrl.kernels.llvm import Sampling
from mbctrl.kernels.program import Program

_KEY = "dynamics.device"
# Quotients and roots good to 2 units in the last place, as on the processor: an eighth less code. Infinities and NaN stay.
_OPTIONS = ("--fmad=true", "--prec-div=false", "--prec-sqrt=false")
_USED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of each thread: registers, and bytes of local memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def compile_program(text: str, arch: str = "sm_90", folder: Path | None = None) -> bytes:
    """Return compiled CUDA C, from the cache if it is there.

    Args:
        text: the source, of ``cuda.source``.
        arch: ``sm_90`` gives machine code (cubin) for that architecture, ``compute_90`` PTX for it and later ones.
        folder: of the cache of compiled code; None: the user's.

    Errors:
        ModelError: where there is no compiler, or it refuses the source.
    """
    identity = (text, arch, _OPTIONS, _version())
    path = (
        folder or cache_folder()
    ) / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.{'cubin' if _machine(arch) else 'ptx'}"
    code = read(path)
    if code is None:
        code = _compile(text, arch)[0]
        write(path, code)
    return code


def usage(text: str, arch: str = "sm_90") -> Usage:
    """Compile CUDA C for ``arch`` (``sm_...``) and return what the assembler says of its kernel."""
    log = _compile(text, arch)[1]
    found = _USED.search(log)
    if found is None:
        raise ModelError(f"the CUDA compiler tells nothing of registers for {arch}: {log}", key=_KEY)
    stack, stores, loads, registers = map(int, found.groups())
    return Usage(registers, stack, stores, loads)


def _machine(arch: str) -> bool:
    return arch.startswith("sm_")


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library behind it is found only now
    except (ImportError, RuntimeError) as error:
        raise ModelError(f'rollouts on a GPU need the CUDA compiler: pip install "mbctrl[cuda]" ({error})', key=_KEY) from None
    return nvrtc


def _version() -> tuple[int, int]:
    _, major, minor = _nvrtc().nvrtcVersion()
    return int(major), int(minor)


def _compile(text: str, arch: str) -> tuple[bytes, str]:
    """Return code and the compiler's words."""
    # Not through cuda.core.Program: it asks for a driver before it gives PTX.
    nvrtc = _nvrtc()
    options = [f"--gpu-architecture={arch}", *_OPTIONS, *(["--ptxas-options=-v"] if _machine(arch) else [])]
    error, handle = nvrtc.nvrtcCreateProgram(text.encode(), b"rollout.cu", 0, [], [])
    _check(error, "cannot take the source")
    try:
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        log = _fetch(nvrtc, handle, "ProgramLog").decode(errors="replace").strip("\0 \n")
        _check(error, f"refuses the source for {arch}: {log[:500]}")
        return _fetch(nvrtc, handle, "CUBIN" if _machine(arch) else "PTX"), log
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def _fetch(nvrtc: Any, handle: Any, name: str) -> bytes:
    """Return one of a compiled program's texts."""
    error, size = getattr(nvrtc, f"nvrtcGet{name}Size")(handle)
    _check(error, f"has no {name}")
    buffer = bytearray(size)
    (error,) = getattr(nvrtc, f"nvrtcGet{name}")(handle, buffer)
    _check(error, f"does not give its {name}")
    return bytes(buffer)


def _check(error: Any, what: str) -> None:
    if int(error):
        raise ModelError(f"the CUDA compiler {what} ({error.name})", key=_KEY)


def _device(index: int) -> tuple[Any, Any]:
    """Return cuda.core and a GPU, its context current."""
    try:
        import cuda.core as core
    except ImportError as error:
        raise ModelError(f'rollouts on a GPU need cuda-core: pip install "mbctrl[cuda]" ({error})', key=_KEY) from None
    try:
        device = core.Device(index)
        device.set_current()
    except Exception as error:  # no driver, no device, a driver older than the binding: each its own kind
        raise ModelError(f"no CUDA device {index} here: {error}", key=_KEY) from None
    return core, device


class GpuKernel:
    """A program on a GPU.

    It works in the device's primary context, which is torch's too. Construct it before a graph is captured: code is loaded
    then, and a launch only queues work, so that launches may be captured.

    Args:
        program: what to compile.
        dtype: float32, or float64 for tests.
        sampling: how commands come; see ``Sampling``.
        device: index of the GPU.
        block: threads of a block, at most BLOCK.
        folder: of the cache of compiled code; None: the user's.

    Errors:
        ModelError: where there is no GPU or no binding to it.
    """

    def __init__(
        self,
        program: Program,
        dtype: type = np.float32,
        sampling: Sampling | None = None,
        *,
        device: int = 0,
        block: int = BLOCK,
        folder: Path | None = None,
    ) -> None:
        if not 1 <= block <= BLOCK:
            raise ValueError(f"expected 1 to {BLOCK} threads in a block, found {block}")
        self.program, self.sampling, self.dtype, self.block = program, sampling, np.dtype(dtype), block
        self._required = required(program, sampling)
        self._core, self.device = _device(device)
        major, minor = self.device.compute_capability
        code = compile_program(source(program, dtype, sampling), f"sm_{major}{minor}", folder)
        try:
            self._kernel = self._core.ObjectCode.from_cubin(code).get_kernel("rollout")
            # Code is loaded at the first launch, which may not happen in a capture: launch once with no samples.
            self._core.launch(
                self._core.LEGACY_DEFAULT_STREAM, self._core.LaunchConfig(grid=1, block=block), self._kernel, *[0] * len(SLOTS)
            )
            self.device.sync()
        except Exception as error:
            raise ModelError(f"the GPU's driver does not take the compiled rollout: {error}", key=_KEY) from None

    def launch(self, stream: int, **values: int) -> None:
        """Queue one rollout of all samples on a stream of the device, which must be current in this thread.

        Nothing is allocated or waited for; all memory must outlive the work.

        Args:
            stream: a CUDA stream's address, as ``torch.cuda.current_stream().cuda_stream``; 0: the default stream.
            values: counts and addresses of contiguous arrays on the device by their names in ``cuda.SLOTS``; in a captured
                graph they stay as they are now.

        Errors:
            ValueError: for an unknown or a missing name, counts below zero, or more given samples than there are.
        """
        unknown, missing = values.keys() - set(SLOTS), [name for name in self._required if not values.get(name)]
        if unknown or missing:
            raise ValueError(f"a rollout needs {', '.join(self._required)}; missing: {missing}, unknown: {sorted(unknown)}")
        if min(values.get(name, 0) for name in COUNTS) < 0 or values.get("fixed", 0) > values["samples"]:
            raise ValueError(
                f"expected samples, steps >= 1 and 0 <= fixed <= samples, found {[values.get(name, 0) for name in COUNTS]}"
            )
        core = self._core
        config = core.LaunchConfig(grid=-(-values["samples"] // self.block), block=self.block)
        queue = core.Stream.from_handle(stream) if stream else core.LEGACY_DEFAULT_STREAM
        core.launch(queue, config, self._kernel, *[int(values.get(name, 0)) for name in SLOTS])
