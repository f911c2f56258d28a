"""Compiles programs for this machine's processor and runs them on a pool of warm threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import threading
import time
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from mbctrl.base.errors import ModelError
from mbctrl.kernels import llvm as lowering
from mbctrl.kernels import network, network_llvm, vector
from mbctrl.kernels.cache import cache_folder, read, write
from mbctrl.kernels.llvm import SLOTS, Lowering, Sampling
from mbctrl.kernels.program import Program
from mbctrl.kernels.vector import Lanes

_SPINS = 20_000  # about a millisecond; then the caller sleeps between looks
_DONE, _BLOCKS = SLOTS.index("done"), SLOTS.index("blocks")


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@cache
def host() -> tuple[str, str, int]:
    """Return this processor's name, its features and the bits of its widest vectors with fused multiply-add.

    Errors:
        ModelError: where there are none: AVX-512, AVX2 with FMA, and NEON are known.
    """
    features = llvm.get_host_cpu_features()
    machine = platform.machine().lower()
    bits = 128 if machine in ("aarch64", "arm64") else 0
    if _is_x86() and features.get("avx2") and features.get("fma"):
        bits = 512 if features.get("avx512f") and features.get("avx512dq") else 256
    if not bits:
        raise ModelError(
            f"no compiled rollouts for this processor ({machine}): expected AVX-512, AVX2 with FMA, or NEON", key="dynamics.backend"
        )
    return llvm.get_host_cpu_name(), features.flatten(), bits


@cache
def _lowering() -> str:
    """Return the hash of the code that lowers, so that no code of an older lowering is taken from the cache."""
    return hashlib.sha256(
        b"".join(Path(m.__file__).read_bytes() for m in (lowering, network, network_llvm, vector, sys.modules[__name__]))
    ).hexdigest()


def lanes_of(dtype: type | np.dtype) -> Lanes:
    """Return the widest vectors of float32 or float64 here."""
    size = np.dtype(dtype).itemsize * 8
    bits = host()[2]
    # Two registers a value where there are 32 of them: a chain of joints is a chain of waits, which the second one fills.
    return Lanes(size, bits // size * (2 if bits == 512 else 1))


class Native:
    """A program's machine code.

    Args:
        program: what to compile.
        dtype: float32, or float64 for tests.
        sampling: how commands come; see ``Lowering``.
        folder: of the cache of compiled code; None: the user's.

    Errors:
        ModelError: on a processor that is not known.
    """

    def __init__(
        self, program: Program, dtype: type = np.float32, sampling: Sampling | None = None, folder: Path | None = None
    ) -> None:
        self.program, self.sampling, self.dtype = program, sampling, np.dtype(dtype)
        self.lanes = lanes_of(dtype)
        name, features, _ = host()
        start = time.perf_counter()
        identity = (program.digest, self.lanes, sampling, _lowering(), llvmlite.__version__, name, features)
        self.key = hashlib.sha256(repr(identity).encode()).hexdigest()
        path = (folder or cache_folder()) / f"{self.key}.o"
        code = read(path)
        self.cached = code is not None
        if code is None:
            code = self._compile(name, features)
            write(path, code)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(name, features), use_lmm=True)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        # A ctypes function lets other Python threads run while it does.
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(self._engine.get_function_address("run"))
        self.seconds = time.perf_counter() - start

    def _compile(self, name: str, features: str) -> bytes:
        text = Lowering(self.program, self.lanes, self.sampling, _is_x86()).text()
        return _machine(name, features).emit_object(llvm.parse_assembly(text))

    def blocks(self, samples: int) -> int:
        """Return how many blocks ``samples`` make; at least a block's samples are needed."""
        if samples < self.lanes.width:
            raise ValueError(f"expected at least {self.lanes.width} samples, found {samples}")
        return -(-samples // self.lanes.width)


@cache
def _prepare() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # LLVM's scheduler would spread two thousand operations out for a parallelism that the processor finds by itself, and
    # spill twice as many registers. The order they were traced in is the better one. The setting is the process's.
    llvm.set_option("mbctrl", "-enable-misched=false")


def _machine(name: str, features: str) -> llvm.TargetMachine:
    # Made anew each time: an execution engine takes its machine over and frees it.
    _prepare()
    return llvm.Target.from_default_triple().create_target_machine(cpu=name, features=features, opt=3, jit=True, codemodel="small")


@cache
def shared_pool(threads: int) -> Pool:
    """Return the process's pool of so many threads; they wait for ever, so there is one for all who plan."""
    return Pool(threads)


class Pool:
    """Threads that wait for jobs; the caller works too.

    Args:
        threads: how many work on a job, the caller included; 0: one a core.
    """

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads or os.cpu_count() or 1
        self._queue: SimpleQueue = SimpleQueue()
        for _ in range(self.threads - 1):
            threading.Thread(target=_work, args=(self._queue,), daemon=True, name="mbctrl-kernel").start()

    def run(self, native: Native, job: np.ndarray, memory: Any = None) -> None:
        """Do all blocks of ``job``.

        ``memory`` owns what the job points at: each thread holds on to it while it works, also where the caller is
        interrupted (Ctrl-C) before the last block is done.
        """
        helpers = min(self.threads, int(job[_BLOCKS])) - 1
        for _ in range(helpers):
            self._queue.put((native, job, memory))  # a thread that comes late finds no block left, in this job's own counter
        native.run(job.ctypes.data, _SPINS if helpers > 0 else 0)
        while job[_DONE] < job[_BLOCKS]:
            time.sleep(5e-5)


def _work(queue: SimpleQueue) -> None:
    while True:
        native, job, memory = queue.get()
        native.run(job.ctypes.data, 0)
        del native, job, memory
