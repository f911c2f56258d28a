"""Child processes of the control side: they leave Ctrl-C to it, and what they raise reaches it."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from mbctrl.base.errors import DriverError, MbctrlError


@contextmanager
def steady() -> Iterator[None]:
    """Keep the garbage collector off what exists already: a full collection of it holds a period up by tens of milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def quiet_start(process: BaseProcess) -> None:
    """Start a process that ignores Ctrl-C from its first instruction on: that is the control side's to handle.

    From another thread than the main one the process inherits what this one does with Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        process.start()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


def answer(pipe: Connection, who: str, work: Callable[[], None]) -> None:
    """Run a child process's ``work`` until its pipe closes; whatever it raises goes to the parent through the pipe."""
    try:
        try:
            work()
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            return
        except MbctrlError as error:
            pipe.send(error)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the control side must learn of it
            pipe.send(DriverError(f"the {who} failed: {type(error).__name__}: {error}", key=who))
    except OSError:
        pass  # the parent is gone: nobody is left to tell
