"""Tells who is at the other end of its channel what it is, for `tests/engine/test_warm.py`."""

from __future__ import annotations

import os
import socket
import sys

if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        what = (os.environ["WARM"], os.environ["PYTHONPATH"], __name__)
        channel.sendall("\n".join(what).encode())
    sys.exit(7)
