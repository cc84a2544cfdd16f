"""A process that is to take the place of one that serves: it proves itself first, and the other goes on until then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from engine.child import how_it_ended
from engine.process import Body
from ipc.channel import ChannelClosed, close_fds
from ipc.errors import EngineError, ProtocolError, StageFailed, from_failure
from ipc.messages.reports import AnyStageReport, Rehearsed
from ipc.messages.stage import Rehearse


async def successor(rehearsal: Rehearse, fds: Sequence[int], timeout: float) -> Body:
    """A new process, with the code that is on disk now, that has built its stages and computed with them.

    `fds`: of the placed components; they stay the caller's. Raises `StageFailed`, or what a stage raises, for a process
    that cannot; it is gone then.
    """
    try:
        body = Body()
    except OSError as error:
        raise StageFailed(f"no new process could be started: {error.strerror}") from error
    try:
        with contextlib.suppress(ChannelClosed):  # dead already: reading tells
            body.channel.try_send(rehearsal, fds)
        async with asyncio.timeout(timeout):
            report = await _report(body)
        if not isinstance(report, Rehearsed):
            raise StageFailed(f"the new process said {type(report).__name__} where its rehearsal was expected")
        if report.error is not None:
            raise from_failure(report.error)
    except TimeoutError:
        body.end()
        raise StageFailed(f"the new process was not ready within {timeout:g} seconds; the old one goes on") from None
    except BaseException as error:
        body.end()
        if isinstance(error, EngineError):
            raise StageFailed(f"the new process cannot take over, and the old one goes on: {error}") from error
        raise
    return body


async def _report(body: Body) -> AnyStageReport:
    """The first thing that the process says. `StageFailed` with how it died, or if it cannot be understood."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(body.channel.fileno(), readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            received = body.channel.try_receive()
            if received is not None:
                close_fds(received.fds)
                return received.message
    except ChannelClosed as error:
        loop.remove_reader(body.channel.fileno())
        loop.add_reader(body.pidfd, readable.set)
        readable.clear()
        await readable.wait()
        how = how_it_ended(body.popen.wait())
        raise StageFailed(f"it ended before it was ready ({how}); what it said is in the engine's log") from error
    except ProtocolError as error:
        raise StageFailed(f"what it said cannot be understood: {error}") from error
    finally:
        loop.remove_reader(body.channel.fileno())
        loop.remove_reader(body.pidfd)
