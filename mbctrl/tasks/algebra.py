"""The tiny algebra terms are written in: numpy numbers, torch tensors and traced scalars take the same source.

A value that is not numpy's or a plain number must bring the method of the function's name; numpy object arrays pass
the call on to their elements by themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_PLAIN = (np.ndarray, np.generic, float, int)


def sqrt(x: Any) -> Any:
    """Square root."""
    return np.sqrt(x) if isinstance(x, _PLAIN) else x.sqrt()


def cos(x: Any) -> Any:
    """Cosine."""
    return np.cos(x) if isinstance(x, _PLAIN) else x.cos()


def positive(x: Any) -> Any:
    """max(x, 0)."""
    return np.maximum(x, 0.0) if isinstance(x, _PLAIN) else x.clip(min=0.0)


def clip01(x: Any) -> Any:
    """x bounded to [0, 1]."""
    return np.clip(x, 0.0, 1.0) if isinstance(x, _PLAIN) else x.clip(min=0.0, max=1.0)


def absolute(x: Any) -> Any:
    """|x|."""
    return np.abs(x) if isinstance(x, _PLAIN) else x.abs()


def maximum(a: Any, b: Any) -> Any:
    """The larger of two, written with ``positive`` so that every carrier has it."""
    return b + positive(a - b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two."""
    return a - positive(a - b)


def dot(a: Any, b: Any) -> Any:
    """Sum of products over the leading index."""
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total = total + a[i] * b[i]
    return total


def pseudo_huber(squared: Any) -> Any:
    """sqrt(1 + s) - 1 of a squared, scaled error: quadratic near zero, linear far away (Charbonnier's loss)."""
    return sqrt(squared + 1.0) - 1.0
