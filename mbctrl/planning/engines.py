"""Where kernels run: this processor's threads, or a GPU. Both take torch tensors' memory as it is."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mbctrl.kernels.llvm import Sampling, words
from mbctrl.kernels.native import Native, Pool, lanes_of
from mbctrl.kernels.program import Program


class Engine(Protocol):
    """Compiles programs and runs them over contiguous tensors of its device.

    ``device`` is the tensors'; ``least`` the fewest samples a run takes; a run's tensors carry the names and shapes of
    ``mbctrl.kernels.llvm.SLOTS``.
    """

    device: torch.device
    least: int

    def compile(self, program: Program, sampling: Sampling | None) -> Any:
        """Return the program's machine code."""

    def run(self, code: Any, tensors: dict[str, Tensor], samples: int, steps: int, fixed: int, seed: int, draw: int) -> None:
        """Roll out; on a GPU the work is queued on torch's current stream."""


class CpuEngine:
    """This processor.

    Args:
        pool: threads.
        dtype: float32, or float64 for tests.
    """

    def __init__(self, pool: Pool, dtype: torch.dtype = torch.float32) -> None:
        self.device, self._pool = torch.device("cpu"), pool
        self._numbers = np.float32 if dtype == torch.float32 else np.float64
        self.least = lanes_of(self._numbers).width

    def compile(self, program: Program, sampling: Sampling | None) -> Native:
        """Return machine code for this processor, from the cache where it is there."""
        return Native(program, self._numbers, sampling)

    def run(self, code: Native, tensors: dict[str, Tensor], samples: int, steps: int, fixed: int, seed: int, draw: int) -> None:
        """Roll out on all threads of the pool, the caller's included."""
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        counts = {"blocks": code.blocks(samples), "samples": samples, "steps": steps, "fixed": fixed}
        self._pool.run(code, words(**counts, seed=seed, draw=draw, **addresses), tensors)


class GpuEngine:
    """A CUDA device.

    Args:
        device: torch's name of it.
        dtype: float32, or float64 for tests.
    """

    least = 1

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self._numbers = np.float32 if dtype == torch.float32 else np.float64

    def compile(self, program: Program, sampling: Sampling | None) -> Any:
        """Return a kernel loaded on the device."""
        from mbctrl.kernels.gpu import GpuKernel  # the CUDA binding is an extra

        return GpuKernel(program, self._numbers, sampling, device=self.device.index or 0)

    def run(self, code: Any, tensors: dict[str, Tensor], samples: int, steps: int, fixed: int, seed: int, draw: int) -> None:
        """Queue the rollout on torch's current stream."""
        signed = seed % 2**64
        key = torch.tensor([signed if signed < 2**63 else signed - 2**64, draw], dtype=torch.int64).to(self.device)
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        stream = torch.cuda.current_stream(self.device).cuda_stream
        code.launch(stream, samples=samples, steps=steps, fixed=fixed, key=key.data_ptr(), **addresses)
