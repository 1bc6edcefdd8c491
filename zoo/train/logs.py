"""What each process of a run says, with the time, in `logs/rank-N.log`; on the terminal only process 0 speaks."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

STALL_SECONDS = 1.0
"""How long a line waits for another thread's; a process about to end must not wait for ever."""


class RankLog:
    """Takes stdout and stderr while it is entered. Lines are kept until `open` says that the run is worth a folder.

    SIGUSR1 writes the stacks of all threads there (to stderr before), without ending anything.
    """

    def __init__(self, folder: Path, process: int) -> None:
        self.file = folder / "logs" / f"rank-{process}.log"
        self._quiet = process > 0
        self._kept: list[str] = []
        self._out: TextIO | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> RankLog:
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Copy(self, sys.stdout, self._quiet), _Copy(self, sys.stderr, False)
        if sys.__stderr__ is not None:
            faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before
        faulthandler.unregister(signal.SIGUSR1)
        if self._out is not None:
            with contextlib.suppress(OSError):
                self._out.close()

    def open(self) -> None:
        """Begins, or goes on, with the file. A disk that is full leaves the run without it."""
        if self._out is not None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._out = self.file.open("a", buffering=1)
            self._out.write("".join(self._kept))
        except OSError as error:
            print(f"{self.file}: {error.strerror}; this process goes on without a log", file=self._before[1])
            return
        faulthandler.register(signal.SIGUSR1, self._out, all_threads=True)

    def stacks(self) -> None:
        """Every thread's stack, to the file and to stderr."""
        self.open()
        for out in (self._out, self._before[1]):
            if out is not None:
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)

    def line(self, text: str) -> None:
        """Logs one line with the time."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        taken = self._lock.acquire(timeout=STALL_SECONDS)
        if self._out is None:
            self._kept.append(line)
        else:
            with contextlib.suppress(OSError):  # a full disk is told of by what the run itself writes
                self._out.write(line)
        if taken:
            self._lock.release()


class _Copy:
    """A stream whose whole lines are also logged."""

    def __init__(self, log: RankLog, stream: TextIO, quiet: bool) -> None:
        self._log, self._stream, self._quiet = log, stream, quiet
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if "\x1b" not in line:  # a progress bar's
                self._log.line(line)
        return len(text) if self._quiet else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
