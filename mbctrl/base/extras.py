"""Optional dependencies, and the pip command that brings each."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mbctrl.base.errors import ExtraError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or raise ExtraError naming ``pip install "mbctrl[EXTRA]"``."""
    try:
        return import_module(module)
    except ImportError:
        raise ExtraError(f'{purpose} needs {module}: pip install "mbctrl[{extra}]"') from None
