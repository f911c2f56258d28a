"""The tiny algebra terms are written in: numpy numbers, torch tensors and traced scalars take the same source.

A value that is not numpy's or a plain number must bring ``sqrt``, ``cos``, ``exp``, ``abs`` and ``clip(min=, max=)``; arrays of
such values (numpy's, of dtype object) are taken element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

_PLAIN = (np.ndarray, np.generic, float, int)


def _elementwise(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    # numpy's own maximum, clip and abs would compare traced scalars, or ask them for methods of other names.
    @wraps(function)
    def lifted(x: Any) -> Any:
        if isinstance(x, np.ndarray) and x.dtype == object:
            return np.frompyfunc(function, 1, 1)(x)
        return function(x)

    return lifted


@_elementwise
def sqrt(x: Any) -> Any:
    """Square root."""
    return np.sqrt(x) if isinstance(x, _PLAIN) else x.sqrt()


@_elementwise
def cos(x: Any) -> Any:
    """Cosine."""
    return np.cos(x) if isinstance(x, _PLAIN) else x.cos()


@_elementwise
def exp(x: Any) -> Any:
    """Exponential."""
    return np.exp(x) if isinstance(x, _PLAIN) else x.exp()


@_elementwise
def positive(x: Any) -> Any:
    """max(x, 0)."""
    return np.maximum(x, 0.0) if isinstance(x, _PLAIN) else x.clip(min=0.0)


@_elementwise
def clip01(x: Any) -> Any:
    """x bounded to [0, 1]."""
    return np.clip(x, 0.0, 1.0) if isinstance(x, _PLAIN) else x.clip(min=0.0, max=1.0)


@_elementwise
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
