"""The process that `tests/engine/warm.py` has others forked from: it loads what a stage needs, and waits."""

from __future__ import annotations

import gc
import os
import runpy
import socket
import sys
import traceback
import warnings
from typing import NoReturn

import msgspec

from stages.forks import fork
from stages.worker import load_libraries

MOST = 1 << 20
"""Bytes of an `Asked`: an environment, mostly."""


class Asked(msgspec.Struct):
    """A process that is what `python -m module FD` is. The descriptor comes along."""

    module: str
    environment: dict[str, str]


def main() -> None:
    """Say when all is loaded; then answer each `Asked` with the number of its process, until nobody asks."""
    asking = socket.socket(fileno=int(sys.argv[1]))
    load_libraries()
    gc.collect()
    gc.freeze()  # what is shared stays shared, as in `stages/forks.py`
    asking.send(b"loaded")
    while True:
        asked, fds, _, _ = socket.recv_fds(asking, MOST, 1)
        if not asked:
            return
        pid = fork()
        if pid == 0:
            asking.close()
            become(msgspec.json.decode(asked, type=Asked), fds[0])
        os.close(fds[0])
        asking.send(str(pid).encode())


def become(asked: Asked, fd: int) -> NoReturn:
    """Run the module, as an interpreter does that was started for it."""
    os.environ.clear()
    os.environ.update(asked.environment)
    sys.argv[1:] = [str(fd)]
    warnings.filterwarnings("ignore", "'stages.worker' found in sys.modules", RuntimeWarning)
    code = 1
    try:
        runpy.run_module(asked.module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
