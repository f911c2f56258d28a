"""What planners compute with: numpy arrays on a processor, torch tensors on a GPU or where torch is the model.

An operation on a few dozen numbers costs what calling it costs, and numpy's calls cost half of torch's; a plan that takes
under a millisecond notices. Code that both share uses operators and the functions of ``namespace``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = Union[np.ndarray, "Tensor"]


def namespace(array: Array) -> ModuleType:
    """Return the module whose functions take ``array``: numpy or torch."""
    if isinstance(array, np.ndarray):
        return np
    import torch  # a planner on a robot's processor does without

    return torch


def like(values: Any, array: Array) -> Array:
    """Return ``values`` (numpy's) as an array of the kind, precision and device of ``array``."""
    if isinstance(array, np.ndarray):
        return np.asarray(values, array.dtype)
    return tensor(values, array.dtype, array.device)


def tensor(values: Any, dtype: Any, device: Any) -> Tensor:
    """Return ``values``, numpy's or a tensor, as a tensor that shares nothing with numpy's memory."""
    import torch

    if not isinstance(values, torch.Tensor):
        values = torch.from_numpy(np.array(values))  # a copy: tensors of read-only arrays are not allowed
    return values.to(device, dtype)


def host(array: Array) -> np.ndarray:
    """Return ``array`` as numpy's, without a copy where it is in the processor's memory."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
