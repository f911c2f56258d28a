"""Where kernels run: this processor's threads, on numpy's memory, or a GPU, on torch's."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mbctrl.kernels.llvm import Sampling, words
from mbctrl.kernels.native import Native, Pool, lanes_of
from mbctrl.kernels.program import Program
from mbctrl.planning.arrays import Array, tensor


class Engine(Protocol):
    """Compiles programs and runs them over contiguous arrays of its memory and precision.

    ``least`` is the fewest samples a run takes; a run's arrays carry the names and shapes of ``mbctrl.kernels.llvm.SLOTS``.
    """

    least: int

    def array(self, values: Any) -> Array:
        """Return ``values``, numpy's or a tensor, as a contiguous array of this engine's, copied only where it must be."""

    def empty(self, *shape: int) -> Array:
        """Return memory for an array."""

    def compile(self, program: Program, sampling: Sampling | None) -> Any:
        """Return the program's machine code."""

    def run(self, code: Any, arrays: dict[str, Array], samples: int, steps: int, fixed: int, seed: int, draw: int) -> None:
        """Roll out; on a GPU the work is queued on torch's current stream."""


class CpuEngine:
    """This processor.

    Args:
        pool: threads.
        dtype: numpy's float32, or float64 for tests.
    """

    def __init__(self, pool: Pool, dtype: type = np.float32) -> None:
        self._pool, self.dtype = pool, np.dtype(dtype).type
        self.least = lanes_of(self.dtype).width

    def array(self, values: Any) -> np.ndarray:
        """Return a contiguous numpy array."""
        return np.ascontiguousarray(values, self.dtype)

    def empty(self, *shape: int) -> np.ndarray:
        """Return memory for a numpy array."""
        return np.empty(shape, self.dtype)

    def compile(self, program: Program, sampling: Sampling | None) -> Native:
        """Return machine code for this processor, from the cache where it is there."""
        return Native(program, self.dtype, sampling)

    def run(self, code: Native, arrays: dict[str, Array], samples: int, steps: int, fixed: int, seed: int, draw: int) -> None:
        """Roll out on all threads of the pool, the caller's included."""
        addresses = {name: array.__array_interface__["data"][0] for name, array in arrays.items()}
        counts = {"blocks": code.blocks(samples), "samples": samples, "steps": steps, "fixed": fixed}
        self._pool.run(code, words(**counts, seed=seed, draw=draw, **addresses), arrays)


class GpuEngine:
    """A CUDA device.

    Args:
        device: torch's device.
        dtype: numpy's float32, or float64 for tests.
    """

    least = 1

    def __init__(self, device: Any, dtype: type = np.float32) -> None:
        import torch  # whose memory it works in

        self._torch, self._device, self.dtype = torch, device, np.dtype(dtype).type
        self._like = {"dtype": torch.float32 if self.dtype is np.float32 else torch.float64, "device": device}

    def array(self, values: Any) -> Any:
        """Return a contiguous tensor on the device."""
        return tensor(values, **self._like).contiguous()

    def empty(self, *shape: int) -> Any:
        """Return memory for a tensor."""
        return self._torch.empty(shape, **self._like)

    def compile(self, program: Program, sampling: Sampling | None) -> Any:
        """Return a kernel loaded on the device."""
        from mbctrl.kernels.gpu import GpuKernel  # the CUDA binding is an extra

        return GpuKernel(program, self.dtype, sampling, device=self._device.index or 0)

    def run(self, code: Any, arrays: dict[str, Array], samples: int, steps: int, fixed: int, seed: int, draw: int) -> None:
        """Queue the rollout on torch's current stream."""
        signed = seed % 2**64
        key = self._torch.tensor([signed if signed < 2**63 else signed - 2**64, draw], dtype=self._torch.int64)
        key = key.to(self._device)
        addresses = {name: array.data_ptr() for name, array in arrays.items()}
        stream = self._torch.cuda.current_stream(self._device).cuda_stream
        code.launch(stream, samples=samples, steps=steps, fixed=fixed, key=key.data_ptr(), **addresses)
