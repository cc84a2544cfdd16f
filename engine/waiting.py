"""Waiting for a socket, apart from reading and writing it: a wait that ends or is cut off has moved no bytes, so
between any two turns of the loop it is known what was read and what was sent."""

from __future__ import annotations

import asyncio
import socket


async def readable(sock: socket.socket) -> None:
    """Until there is something to read, or the end. One at a time per socket."""
    loop = asyncio.get_running_loop()
    fd, ready = sock.fileno(), loop.create_future()
    loop.add_reader(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(sock: socket.socket) -> None:
    """Until there is room to write, or nobody to write to. One at a time per socket."""
    loop = asyncio.get_running_loop()
    fd, ready = sock.fileno(), loop.create_future()
    loop.add_writer(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
