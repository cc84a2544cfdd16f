"""The engine on a Unix socket: who may connect, what is said, and what a bad client costs (nothing, to anybody else).

`docs/protocol.md` is the contract. A client's messages are answered one after the other, so it can hold back at most
itself; its memory here is one frame in, 64 KiB and one frame out, and one small event per task that it follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator

import msgspec

from engine.decode import decode_strictly
from engine.params import UserParams
from engine.paths import SocketClaim, peer_ids
from engine.supervisor import Supervisor
from engine.version import VERSION
from ipc.errors import (
    BadRequest,
    Busy,
    EngineError,
    Failure,
    NotFound,
    PermissionDenied,
    ProtocolError,
    VersionMismatch,
)
from ipc.frames import MAX_FRAME, FrameReader, encode_frame
from ipc.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AnyClientMessage,
    AnyServerMessage,
    Cancel,
    GetStatus,
    Hello,
    ListTasks,
    Ok,
    Refused,
    Shutdown,
    Status,
    Submit,
    Subscribe,
    TaskInfo,
    TaskList,
    Welcome,
)

READ_BYTES = 64 * 1024
WRITE_BUFFER_BYTES = 64 * 1024
LISTED_PROMPT = 200
"""Characters of each prompt in `list`."""
MAX_REASON = 2000
"""Characters of the message of a `Refused`."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What clients may take. Times in seconds."""

    clients: int = 256
    followed: int = 128
    """Tasks whose events one connection may receive at a time."""
    handshake: float = 5.0
    frame: float = 10.0
    """From the first byte of a frame to its last."""
    drain: float = 10.0
    """A client may leave its answers unread for this long before it is cut off."""
    close: float = 2.0
    """For last words to reach the clients when the server stops."""


log = logging.getLogger(__name__)


class Server:
    """Serves one supervisor at one socket.

    Resource handling: owns the claim on the path; between `start` and `stop` the listening socket and every connection.
    Error handling: nothing a client does is raised here; it is answered with `Refused`, or the connection ends.
    """

    def __init__(self, supervisor: Supervisor, claim: SocketClaim, limits: Limits | None = None) -> None:
        self.supervisor = supervisor
        self.limits = limits or Limits()
        self.drain_asked = asyncio.Event()
        """A client asked to finish what was accepted and stop."""
        self.stop_asked = asyncio.Event()
        """A client asked to stop now."""
        self._claim = claim
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], Connection] = {}

    async def start(self) -> None:
        """Listen. Raises `BadConfig` if the path cannot be bound."""
        self._listener = await asyncio.start_unix_server(self._connected, sock=self._claim.bind(), limit=READ_BYTES)

    async def stop(self) -> None:
        """Give the path back, let the events of ended tasks reach their clients, and close every connection.

        In this order: a client that sees its connection end can start another engine at once.
        """
        if self._listener is None:
            return
        self._listener.close()
        self._claim.close()
        following = [task for connection in self._connections.values() for task in connection.following.values()]
        if following:
            await asyncio.wait(following, timeout=self.limits.close)
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        if connections:
            await asyncio.wait(connections, timeout=2 * self.limits.close)
        self._listener = None

    @property
    def clients(self) -> int:
        return len(self._connections)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = peer_ids(writer.get_extra_info("socket"))
        refusal: EngineError | None = None
        if uid not in (os.geteuid(), 0):
            refusal = PermissionDenied("this engine serves only the user who started it")
        elif len(self._connections) >= self.limits.clients:
            refusal = Busy(f"{self.limits.clients} clients are connected, which is the limit; try again", 1.0)
        if refusal is not None:
            log.warning("refused a connection of process %d, user %d: %s", pid, uid, refusal)
            writer.write(encode_frame(_refused(None, refusal)))
            writer.close()
            return
        connection = Connection(self, reader, writer, pid, uid)
        task = asyncio.get_running_loop().create_task(connection.run(), name=f"client-{pid}")
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)


class Connection:
    """One client, from its first byte to its last.

    Resource handling: owns the stream and one asyncio task per followed task; `run` ends them all, whatever happens.
    """

    def __init__(
        self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int, uid: int
    ) -> None:
        self.following: dict[str, asyncio.Task[None]] = {}
        self._server = server
        self._supervisor = server.supervisor
        self._limits = server.limits
        self._reader = reader
        self._writer = writer
        self._writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._pid, self._uid = pid, uid
        self._frames: FrameReader[AnyClientMessage] = FrameReader(AnyClientMessage)
        self._decoded: Iterator[AnyClientMessage] = iter(())
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Greet, then answer until the client leaves, errs, or stops reading."""
        try:
            if await self._greet():
                while (message := await self._receive()) is not None:
                    await self._handle(message)
        except ProtocolError as error:
            log.warning("process %d broke the protocol: %s", self._pid, error)
            with contextlib.suppress(OSError):
                await self._send(_refused(None, error))
        except OSError:
            # The client left, or left its answers unread (TimeoutError is an OSError): nobody is there to be told.
            log.debug("process %d is gone", self._pid)
        finally:
            await self._close()

    async def _greet(self) -> bool:
        """The handshake: whether the client may go on."""
        try:
            async with asyncio.timeout(self._limits.handshake):
                hello = await self._receive()
        except TimeoutError:
            raise ProtocolError(f"no hello came within {self._limits.handshake:g} seconds") from None
        if hello is None:
            return False
        if not isinstance(hello, Hello):
            raise ProtocolError(f"the first message was {_tag(hello)!r}; it must be 'hello'")
        if hello.version != PROTOCOL_VERSION:
            error = VersionMismatch(
                f"the client speaks version {hello.version} of the protocol and this engine ({VERSION}) speaks version "
                f"{PROTOCOL_VERSION}: use the client that comes with this engine"
            )
            await self._send(_refused(hello.ref, error))
            return False
        model = self._supervisor.model.name
        await self._send(Welcome(ref=hello.ref, version=PROTOCOL_VERSION, engine=VERSION, model=model, pid=os.getpid()))
        return True

    async def _receive(self) -> AnyClientMessage | None:
        """The next message; None when the client has closed its side."""
        complete_by: float | None = None
        while (message := next(self._decoded, None)) is None:
            if self._frames.unfinished and complete_by is None:
                complete_by = asyncio.get_running_loop().time() + self._limits.frame
            try:
                async with asyncio.timeout_at(complete_by):
                    data = await self._reader.read(READ_BYTES)
            except TimeoutError:
                raise ProtocolError(f"a frame was not complete after {self._limits.frame:g} seconds") from None
            if not data:
                return None
            self._decoded = self._frames.feed(data)
        return message

    async def _handle(self, message: AnyClientMessage) -> None:
        """Answer one message; what follows from the answer happens after it was sent."""
        try:
            reply = await self._answer(message)
        except ProtocolError:
            raise
        except EngineError as error:
            reply = _refused(message.ref, error)
        except Exception:
            log.exception("answering %r of process %d failed", _tag(message), self._pid)
            reply = Refused(ref=message.ref, error=Failure(EngineError.code, "the engine failed; its log says more"))
        await self._send(reply)
        match message, reply:
            case (Submit(subscribe=True), Accepted(id=identity)) | (Subscribe(id=identity), Ok()):
                self._follow(identity)
            case Shutdown(drain=drain), Ok():
                (self._server.drain_asked if drain else self._server.stop_asked).set()

    async def _answer(self, message: AnyClientMessage) -> AnyServerMessage:
        match message:
            case Submit():
                return await self._submit(message)
            case Subscribe(ref=ref, id=identity):
                self._check_may_follow()
                self._supervisor.events(identity)
                return Ok(ref=ref)
            case Cancel(ref=ref, id=identity):
                await self._supervisor.cancel(identity)
                return Ok(ref=ref)
            case ListTasks(ref=ref):
                tasks, omitted = fitting(self._supervisor.tasks())
                return TaskList(ref=ref, tasks=tasks, omitted=omitted)
            case GetStatus(ref=ref):
                return Status(ref=ref, status=self._supervisor.status())
            case Shutdown(ref=ref):
                if self._uid != os.geteuid():
                    raise PermissionDenied("only the user who started this engine may stop it")
                log.info("process %d asked for a shutdown (drain=%s)", self._pid, message.drain)
                return Ok(ref=ref)
            case Hello():
                raise ProtocolError("a second 'hello' came; it is the first message only")

    async def _submit(self, message: Submit) -> Accepted:
        if message.subscribe:
            self._check_may_follow()
        try:
            given = msgspec.msgpack.decode(message.params)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BadRequest(f"the params are not MessagePack: {error}") from error
        try:
            accepted = await self._supervisor.submit(decode_strictly(UserParams, given, BadRequest, "the request"))
        except EngineError as error:
            log.info("refused a request of process %d: %s", self._pid, error)
            raise
        log.info("accepted %s of process %d, position %d", accepted.id, self._pid, accepted.position)
        return msgspec.structs.replace(accepted, ref=message.ref)

    def _check_may_follow(self) -> None:
        if len(self.following) >= self._limits.followed:
            raise Busy(f"this connection follows {len(self.following)} tasks, which is the limit; open another", 1.0)

    def _follow(self, identity: str) -> None:
        """Send the task's events from now on; once, however often it is asked for."""
        if identity not in self.following:
            task = asyncio.get_running_loop().create_task(self._send_events(identity), name=f"events-{identity}")
            self.following[identity] = task
            task.add_done_callback(lambda _: self.following.pop(identity))

    async def _send_events(self, identity: str) -> None:
        try:
            async for event in self._supervisor.events(identity):
                await self._send(event)
        except NotFound:
            log.warning("%s was forgotten before its events could be sent", identity)
        except OSError:
            log.debug("process %d left before the end of %s", self._pid, identity)

    async def _send(self, message: AnyServerMessage) -> None:
        """Write one frame and wait until the client has room for the next. Cuts off a client that does not read."""
        frame = encode_frame(message)
        async with self._sending:
            if self._writer.is_closing():
                raise ConnectionResetError("the client is gone")
            self._writer.write(frame)
            try:
                async with asyncio.timeout(self._limits.drain):
                    await self._writer.drain()
            except TimeoutError:
                log.warning("process %d left its answers unread for %g seconds; cut off", self._pid, self._limits.drain)
                self._writer.transport.abort()
                raise

    async def _close(self) -> None:
        for task in self.following.values():
            task.cancel()
        self._writer.close()
        try:
            async with asyncio.timeout(self._limits.close):
                await self._writer.wait_closed()
        except OSError:
            self._writer.transport.abort()


def fitting(tasks: Iterable[TaskInfo]) -> tuple[list[TaskInfo], int]:
    """The tasks that fit into one frame, in their order, and how many do not: the oldest finished ones go first.

    Prompts are shortened to `LISTED_PROMPT` characters.
    """
    rows = [msgspec.structs.replace(task, prompt=_shortened(task.prompt)) for task in tasks]
    unfinished = [i for i, row in enumerate(rows) if row.state in ("queued", "running")]
    finished = [i for i, row in enumerate(rows) if row.state not in ("queued", "running")]
    room, kept = MAX_FRAME - 1024, set[int]()
    for i in unfinished + finished[::-1]:
        room -= len(msgspec.msgpack.encode(rows[i]))
        if room < 0:
            break
        kept.add(i)
    return [rows[i] for i in sorted(kept)], len(rows) - len(kept)


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= LISTED_PROMPT else prompt[: LISTED_PROMPT - 1] + "\u2026"


def _refused(ref: int | None, error: EngineError) -> Refused:
    """What a message is refused with. A text that repeats what the client sent may be as long as that: it is cut."""
    failure = Failure(error.code, str(error)[:MAX_REASON])
    return Refused(ref=ref, error=failure, retry_after=error.retry_after if isinstance(error, Busy) else None)


def _tag(message: msgspec.Struct) -> str:
    return str(message.__struct_config__.tag)
