"""The `engine` command: what is there before all else is imported, so that Ctrl-C is quiet from the first moment."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C has ended."""


def main() -> None:
    """Run the command line. Until its modules are there, nothing has begun that Ctrl-C would have to end."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored, as after nohup
    if listens:
        signal.signal(signal.SIGINT, leave)
    from engine.cli import main as run

    if listens:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
