"""`stages.worker` whose writer, when it has put a file in place and before it can say so, kills a process, if the file
$PLACING is there, which it removes: the one whose pid that says, or itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import ipc.files
import stages.worker

place = ipc.files.Directory.place


def place_and_kill(directory: ipc.files.Directory, files: Mapping[str, str]) -> None:
    place(directory, files)
    order = Path(os.environ["PLACING"])
    if order.exists():
        victim = int(order.read_text() or os.getpid())
        order.unlink()
        os.kill(victim, signal.SIGKILL)


ipc.files.Directory.place = place_and_kill  # type: ignore[method-assign]

if __name__ == "__main__":
    stages.worker.main()
