"""One client on the engine's side: what it says, what it gets, and how much it may take.

No bytes wait in this process: what a client sends stays in its socket until the message before it is answered, and what
it does not read stays with the one frame that is being sent. So its memory here is 64 KiB and one frame, and one small
event per task that it follows.

Between two turns of the loop a session is plain data (`SessionState`): bytes are read and sent by calls that do not
wait (`engine/waiting.py`). That is how the program that takes the place of this one goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Iterator
from typing import Protocol, TypeAlias

import msgspec

from engine.decode import decode_strictly
from engine.listing import fitting, shortened
from engine.pace import Pace, Turnstile
from engine.params import UserParams
from engine.receiving import Incoming
from engine.settings import read_attention, read_placement
from engine.states import Descriptors, State
from engine.supervisor import Supervisor
from engine.version import VERSION
from engine.waiting import readable, writable
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
from ipc.frames import FrameReader, encode_frame
from ipc.messages.client import (
    PROTOCOL_VERSION,
    AddLora,
    AnyClientMessage,
    Cancel,
    ChangeMemory,
    GetMemory,
    GetStatus,
    GetTrace,
    Hello,
    ListLoras,
    ListTasks,
    ListVersions,
    Reload,
    ReloadSupervisor,
    RemoveLora,
    ReplaceStages,
    Rollback,
    Shutdown,
    Submit,
    Subscribe,
    UpdateWeights,
)
from ipc.messages.server import (
    Accepted,
    AnyServerMessage,
    Done,
    Failed,
    LoraList,
    MemoryReport,
    Ok,
    Refused,
    Status,
    SupervisorReloaded,
    TaskRows,
    VersionList,
    Welcome,
)

READ_BYTES = 16 * 1024
"""What is kept of it, with all else of a connection but the frame that is being sent, is within 64 KiB: measured,
`python -m tools.neighbours`."""
MAX_PARAMS = 64 * 1024
"""Bytes of MessagePack in the `params` of a `submit`. What is decoded may be 64 times as large."""
MAX_REASON = 2000
"""Characters of the message of a `Refused`, and of what the log says about a client."""

CHANGES = (
    Reload, ReplaceStages, UpdateWeights, Rollback, ChangeMemory, AddLora, RemoveLora, ReloadSupervisor, Shutdown,
)  # fmt: skip
"""What changes the engine: the log has who asked for it, and why it was refused."""

AnyReply: TypeAlias = AnyServerMessage | TaskRows
"""What is said to a client."""

log = logging.getLogger(__name__)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What clients may take. Times in seconds."""

    clients: int = 256
    followed: int = 128
    """Tasks whose events one connection may receive at a time."""
    burst: int = 256
    """Messages that are answered as fast as they come; `rate` more per second."""
    rate: float = 32.0
    calm: int = 8
    """Messages at once, and `rate` more per second, of a client that goes before those who ask more."""
    handshake: float = 5.0
    frame: float = 10.0
    """From the first byte of a frame to its last."""
    drain: float = 10.0
    """A client may leave a frame unread for this long before it is cut off."""
    close: float = 2.0
    """For last words to reach the clients when the server stops."""


class Host(Protocol):
    """What a session asks of the server that it belongs to."""

    gate: asyncio.Event
    """While it is not set, no message is taken up."""
    turnstile: Turnstile
    """For those who ask much."""

    def handle_shutdown(self, drain: bool) -> None:
        """A client asked for the end."""

    def handle_reload(self) -> Awaitable[None]:
        """A client asked for the new program. Comes back only with an `EngineError`, or if it is cancelled."""


class SessionState(State, frozen=True, kw_only=True):
    """A session between two turns of the loop. Deadlines begin anew."""

    socket: int
    """Place of the descriptor."""
    greeted: bool
    buffer: bytes
    """Read and not answered."""
    unsent: bytes
    """Of the frame that is being sent, and the answer that waits for it."""
    last_words: bool
    """After what is unsent, the connection ends."""
    follow: list[str]
    """Tasks whose end was not said."""
    pace_left: float
    reload_ref: int | None
    """Of the message that asked for the new program, if this client did: the new program answers it."""


class Session:
    """One client, from its first byte to its last.

    Resource handling: owns the socket and one asyncio task per followed task; `run` ends them all, whatever happens.
    """

    def __init__(
        self, supervisor: Supervisor, limits: Limits, connection: socket.socket, peer: tuple[int, int], host: Host
    ) -> None:
        """`peer`: its pid and uid."""
        self.following: dict[str, asyncio.Task[None]] = {}
        self.outgoing = 0
        """Bytes of the frame that is being sent."""
        self._supervisor = supervisor
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._socket.setblocking(False)
        self._incoming = Incoming(connection)
        self.pid, self._uid = peer
        self._host = host
        self._pace = Pace(self._limits.burst, self._limits.rate, self._loop.time())
        self._calm = Pace(self._limits.calm, self._limits.rate, self._loop.time())
        self._frames: FrameReader[AnyClientMessage] = FrameReader(AnyClientMessage)
        self._decoded: Iterator[AnyClientMessage] = iter(())
        self._sending = asyncio.Lock()
        self._broken = False
        """A frame was not sent to its end: nothing that could be said now would be understood."""
        self._rest = memoryview(b"")
        """Of the frame that is being sent."""
        self._unsaid: AnyReply | None = None
        """The answer, until its frame is being sent."""
        self._then: AnyClientMessage | None = None
        """The message whose answer is not sent to its end; what follows from it happens then."""
        self._taken_up = False
        """A message is being answered, which is nowhere but in the coroutine that does it."""
        self._reload_ref: int | None = None
        self._greeted = False
        self._last_words = False
        self._follow_first: list[str] = []
        """Tasks that were followed under the program before this one."""
        self._ends_said: set[str] = set()
        """Tasks whose end is being sent, or was."""
        self._complete_by: float | None = None

    async def run(self) -> None:
        """Greet, then answer until the client leaves, errs, or stops reading."""
        try:
            await self._say_the_rest()
            if not self._last_words and (self._greeted or await self._greet()):
                while await self._answer_one():
                    pass
        except ProtocolError as error:
            log.warning("process %d broke the protocol: %s", self.pid, shortened(str(error), MAX_REASON))
            with contextlib.suppress(OSError):
                await self._say_last(refusal(None, error))
        except OSError:
            # The client left, or left its answers unread (TimeoutError is an OSError): nobody is there to be told.
            log.debug("process %d is gone", self.pid)
        finally:
            await self._close()

    async def _answer_one(self) -> bool:
        """Take one message and answer it; False when there are no more. A message lives no longer than this call.

        Everything here may happen without waiting for anything, so others get their turn by the sleep, if only of 0.
        """
        await asyncio.sleep(self._pace.wait(self._loop.time()))
        message = await self._receive()
        if message is None:
            return False
        await self._handle(message)
        for pace in (self._pace, self._calm):
            pace.count(self._loop.time())
        return True

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
            await self._say_last(refusal(hello.ref, error))
            return False
        model, pid = self._supervisor.model.name, os.getpid()
        self._greeted = True
        await self._reply(hello, Welcome(ref=hello.ref, version=PROTOCOL_VERSION, engine=VERSION, model=model, pid=pid))
        return True

    async def _receive(self) -> AnyClientMessage | None:
        """The next message; None when the client has closed its side."""
        while True:
            if self._calm.left(self._loop.time()) <= 0:
                await self._host.turnstile.wait()
            await self._host.gate.wait()
            if (message := next(self._decoded, None)) is not None:
                if self._incoming.has_descriptor and not isinstance(message, UpdateWeights):
                    raise ProtocolError(f"a descriptor came with {_tag(message)!r}, which takes none")
                self._complete_by, self._taken_up = None, True
                return message
            if self._frames.unfinished and self._complete_by is None:
                self._complete_by = self._loop.time() + self._limits.frame
            try:
                data = self._incoming.read(READ_BYTES)
            except BlockingIOError:
                await self._wait_for_more()
            else:
                if not data:
                    return None
                self._decoded = self._frames.feed(data)

    async def _wait_for_more(self) -> None:
        try:
            async with asyncio.timeout_at(self._complete_by):
                await readable(self._socket)
        except TimeoutError:
            raise ProtocolError(f"a frame was not complete after {self._limits.frame:g} seconds") from None

    async def _handle(self, message: AnyClientMessage) -> None:
        """Answer one message; what follows from the answer happens after it was sent."""
        try:
            reply = await self._answer(message)
        except ProtocolError:
            raise
        except EngineError as error:
            if isinstance(message, CHANGES):
                log.warning("refused %r of process %d: %s", _tag(message), self.pid, shortened(str(error), MAX_REASON))
            reply = refusal(message.ref, error)
        except Exception:
            log.exception("answering %r of process %d failed", _tag(message), self.pid)
            reply = Refused(ref=message.ref, error=Failure(EngineError.code, "the engine failed; its log says more"))
        await self._reply(message, reply)
        if (identity := _followed(message, reply)) is not None:
            self._follow(identity)
        if isinstance(message, Shutdown) and isinstance(reply, Ok):
            self._host.handle_shutdown(message.drain)

    async def _reply(self, message: AnyClientMessage, reply: AnyReply) -> None:
        self._unsaid, self._then, self._taken_up = reply, message, False
        self._follow_first = [identity] if (identity := _followed(message, reply)) is not None else []
        await self._send(reply)
        self._then, self._follow_first = None, []

    async def _say_last(self, reply: AnyReply) -> None:
        self._unsaid, self._last_words, self._taken_up = reply, True, False
        await self._send(reply)

    async def _answer(self, message: AnyClientMessage) -> AnyReply:
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
                rows, omitted = fitting(self._supervisor.rows())
                return TaskRows(ref=ref, tasks=rows, omitted=omitted)
            case GetStatus(ref=ref, memory=memory):
                held = self._supervisor.memory() if memory else []
                return Status(ref=ref, status=self._supervisor.status(), memory=held)
            case Reload(ref=ref):
                self._check_owner("change what it serves")
                log.info("process %d asked for a reload of %s", self.pid, message.checkpoint)
                return msgspec.structs.replace(await self._supervisor.reload(message), ref=ref)
            case ReplaceStages(ref=ref, stages=stages, attention_backend=attention, threads=threads, placement=place):
                self._check_owner("replace its processes")
                log.info("process %d asked for new processes of %s", self.pid, ", ".join(stages) or "all stages")
                replaced = await self._supervisor.replace_stages(
                    stages, attention_backend=None if attention is None else read_attention(attention),
                    threads=threads, placement=None if place is None else read_placement(place),
                )  # fmt: skip
                log.info("new processes serve: %s", ", ".join(f"{seat} {pid}" for seat, pid in replaced.pids.items()))
                return msgspec.structs.replace(replaced, ref=ref)
            case UpdateWeights():
                return await self._update_weights(message)
            case Rollback(ref=ref, when=when):
                self._check_owner("change what it serves")
                log.info("process %d asked for the weights before the last reload", self.pid)
                return msgspec.structs.replace(await self._supervisor.rollback(when), ref=ref)
            case ListVersions(ref=ref):
                return VersionList(ref=ref, versions=self._supervisor.versions())
            case GetTrace(ref=ref):
                return msgspec.structs.replace(self._supervisor.trace(), ref=ref)
            case GetMemory(ref=ref):
                return MemoryReport(ref=ref, devices=self._supervisor.memory_levels())
            case ChangeMemory(ref=ref, level=level, blocks=blocks):
                self._check_owner("change its memory level")
                log.info("process %d asked for memory level %s", self.pid, level)
                return MemoryReport(ref=ref, devices=await self._supervisor.change_memory(level, blocks))
            case AddLora(ref=ref, name=name, files=files):
                self._check_owner("load LoRAs")
                return LoraList(ref=ref, loras=[await self._supervisor.add_lora(name, *files)])
            case RemoveLora(ref=ref, name=name):
                self._check_owner("remove LoRAs")
                await self._supervisor.remove_lora(name)
                return Ok(ref=ref)
            case ListLoras(ref=ref):
                return LoraList(ref=ref, loras=self._supervisor.loras())
            case Shutdown(ref=ref):
                self._check_owner("stop it")
                log.info("process %d asked for a shutdown (drain=%s)", self.pid, message.drain)
                return Ok(ref=ref)
            case ReloadSupervisor(ref=ref):
                return await self._reload_program(ref)
            case Hello():
                raise ProtocolError("a second 'hello' came; it is the first message only")

    async def _update_weights(self, message: UpdateWeights) -> AnyReply:
        fd = self._incoming.take()
        try:
            self._check_owner("change what it serves")
            if fd < 0:
                raise BadRequest("no descriptor came with update_weights; send that of a memfd with the frame")
            log.info("process %d gives weights of the %s", self.pid, shortened(message.component, MAX_REASON))
            reloaded = await self._supervisor.take_weights(message.component, fd, message.when)
            return msgspec.structs.replace(reloaded, ref=message.ref)
        finally:
            if fd >= 0:
                os.close(fd)

    def _check_owner(self, what: str) -> None:
        if self._uid != os.geteuid():
            raise PermissionDenied(f"only the user who started this engine may {what}")

    async def _reload_program(self, ref: int) -> AnyReply:
        """If all goes well, the answer is the new program's."""
        self._check_owner("replace its program")
        log.info("process %d asked for the program that is on disk now", self.pid)
        self._reload_ref = ref
        try:
            await self._host.handle_reload()
        finally:
            self._reload_ref = None
        raise AssertionError("a hand-over comes back with an error only")

    async def _submit(self, message: Submit) -> Accepted:
        if message.subscribe:
            self._check_may_follow()
        size = memoryview(message.params).nbytes
        if size > MAX_PARAMS:
            raise BadRequest(f"the request has {size:,} bytes; the most is {MAX_PARAMS:,}: shorten its texts")
        try:
            given = msgspec.msgpack.decode(message.params)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BadRequest(f"the params are not MessagePack: {error}") from error
        try:
            accepted = await self._supervisor.submit(decode_strictly(UserParams, given, BadRequest, "the request"))
        except EngineError as error:
            log.info("refused a request of process %d: %s", self.pid, shortened(str(error), MAX_REASON))
            raise
        log.info("accepted %s of process %d, position %d", accepted.id, self.pid, accepted.position)
        return msgspec.structs.replace(accepted, ref=message.ref)

    def _check_may_follow(self) -> None:
        if len(self.following) >= self._limits.followed:
            raise Busy(f"this connection follows {len(self.following)} tasks, which is the limit; open another", 1.0)

    def _follow(self, identity: str) -> None:
        """Send the task's events from now on; once, however often it is asked for."""
        if identity not in self.following:
            task = asyncio.get_running_loop().create_task(self._send_events(identity), name=f"events-{identity}")
            self.following[identity] = task
            task.add_done_callback(lambda _: self._forget(identity))

    def _forget(self, identity: str) -> None:
        del self.following[identity]
        self._ends_said.discard(identity)

    async def _send_events(self, identity: str) -> None:
        try:
            async for event in self._supervisor.events(identity):
                await self._send(event)
        except NotFound:
            log.warning("%s was forgotten before its events could be sent", identity)
        except OSError:
            log.debug("process %d left before the end of %s", self.pid, identity)

    async def _send(self, message: AnyReply) -> None:
        """Hand one frame to the kernel, to its last byte. Cuts off a client that does not read.

        Encoded in its turn, not before: of all that is to be said to this client, one frame exists at a time.
        """
        async with self._sending:
            if self._broken:
                raise ConnectionResetError("the client is gone")
            frame = encode_frame(message)
            if message is self._unsaid:
                self._unsaid = None
            elif isinstance(message, Done | Failed):
                self._ends_said.add(message.id)
            await self._send_frame(frame)

    async def _send_frame(self, frame: bytes) -> None:
        """With `_sending` held."""
        self.outgoing, self._broken, self._rest = len(frame), True, memoryview(frame)
        try:
            async with asyncio.timeout(self._limits.drain):
                while self._rest:
                    try:
                        self._rest = self._rest[self._socket.send(self._rest) :]
                    except BlockingIOError:
                        await writable(self._socket)
            self._broken = False
        except TimeoutError:
            log.warning("process %d left its answers unread for %g seconds; cut off", self.pid, self._limits.drain)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # `run`, which may wait for a message, sees the end
            raise
        finally:
            self.outgoing, self._rest = 0, memoryview(b"")

    # From one program to the next.

    @property
    def is_between_messages(self) -> bool:
        """Its state is all there is of it: no message is being answered, but perhaps the one that asks for this."""
        answering = self._taken_up and self._reload_ref is None
        return not (answering or self._incoming.has_descriptor or isinstance(self._then, Shutdown))

    @property
    def is_over(self) -> bool:
        """Its socket is closed."""
        return self._socket.fileno() < 0

    def state(self, fds: Descriptors) -> SessionState:
        unsent = bytes(self._rest) + (encode_frame(self._unsaid) if self._unsaid is not None else b"")
        following = [identity for identity in self.following if identity not in self._ends_said]
        return SessionState(
            socket=fds.put(self._socket.fileno()), greeted=self._greeted, buffer=self._frames.rest, unsent=unsent,
            last_words=self._last_words, follow=following + self._follow_first,
            pace_left=self._pace.left(self._loop.time()), reload_ref=self._reload_ref,
        )  # fmt: skip

    def put_back(self, state: SessionState, paused: float) -> None:
        """Before `run`: go on where the session was under the program before this one. `paused`: seconds since then."""
        self._greeted, self._last_words = state.greeted, state.last_words
        self._decoded = self._frames.feed(state.buffer)
        self._follow_first = list(state.follow)
        self._pace.set_left(state.pace_left)
        self._rest = memoryview(state.unsent)
        if state.reload_ref is not None:
            self._unsaid = SupervisorReloaded(ref=state.reload_ref, engine=VERSION, paused=paused)

    async def _say_the_rest(self) -> None:
        """What the program before this one has left unsent, then the answer to who asked for this one."""
        if self._rest:
            async with self._sending:
                await self._send_frame(bytes(self._rest))
        if self._unsaid is not None:
            await self._send(self._unsaid)
        following, self._follow_first = self._follow_first, []
        for identity in following:
            self._follow(identity)

    async def _close(self) -> None:
        """End what uses the socket, then the socket: the client still gets what the kernel has."""
        following = list(self.following.values())
        for task in following:
            task.cancel()
        try:
            if following:
                await asyncio.wait(following)
        finally:
            self._incoming.close()
            self._socket.close()


def _followed(message: AnyClientMessage, reply: AnyReply) -> str | None:
    """The task whose events come after this answer."""
    match message, reply:
        case (Submit(subscribe=True), Accepted(id=identity)) | (Subscribe(id=identity), Ok()):
            return identity
    return None


def refusal(ref: int | None, error: EngineError) -> Refused:
    """What a message is refused with. A text that repeats what the client sent may be as long as that: it is cut."""
    failure = Failure(error.code, str(error)[:MAX_REASON])
    return Refused(ref=ref, error=failure, retry_after=error.retry_after if isinstance(error, Busy) else None)


def _tag(message: msgspec.Struct) -> str:
    return str(message.__struct_config__.tag)
