"""`engine generate`: one request on a running server if there is one, else on a supervisor of its own.

Ctrl-C cancels the request and waits for the cancel; a second one leaves at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import msgspec
import uvloop

from engine.client import AsyncClient, absolute_params
from engine.connection import NotListening
from engine.decode import decode_strictly
from engine.display.progress import ProgressView, shown_path
from engine.params import SystemParams, UserParams
from engine.requests import Requests
from engine.supervisor import Supervisor
from hotreload.lora_options import EXTENSION
from ipc.errors import BadConfig, Cancelled, EngineError, from_failure
from ipc.messages.server import Accepted, Done, Failed, Progress, TaskEvent, Traced

LOOK_INTERVAL = 0.5
"""Seconds between looks at an engine that is loading."""
LAST_QUANTUM = 1.0
"""Seconds that a trace waits for the end of the quantum that wrote the file."""
LEAVE_DEADLINE = 1.0
"""Seconds that a second Ctrl-C gives the cancel of the first to arrive."""


class Engine(Protocol):
    """What a client of a server and a supervisor have in common."""

    async def submit(self, params: UserParams, /) -> Accepted: ...
    def events(self, identity: str, /) -> AsyncIterator[TaskEvent]: ...
    async def cancel(self, identity: str, /) -> None: ...


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. None in `model`, `checkpoint`, `placement`: whatever the server has, or the default. `lora`:
    on a server, adapters that it has loaded, NAME:STRENGTH; without one, files to be merged, FILE:STRENGTH."""

    params: UserParams
    socket: str | None = None
    model: str | None = None
    checkpoint: str | None = None
    lora: tuple[str, ...] = ()
    placement: str | None = None


class Outcome(msgspec.Struct, frozen=True):
    """`seconds`: from the command to the file, `loading` of them until the stages were up, and `waiting` of them in the
    queue after that. `embedded`: no server."""

    done: Done
    seconds: float
    loading: float
    embedded: bool
    waiting: float = 0.0
    traced: Traced | None = None
    """If that was wanted."""


def run(order: Order, view: ProgressView, *, with_trace: bool = False) -> Outcome:
    """Generate one video. Raises the `EngineError` that it ended with; `Cancelled` after Ctrl-C."""
    return uvloop.run(generate(order, view, with_trace))


async def generate(order: Order, view: ProgressView, with_trace: bool) -> Outcome:
    started = time.monotonic()
    order = msgspec.structs.replace(order, params=absolute_params(order.params))
    with view, Interrupts(view) as interrupts:
        client, wait = await _server(order), Wait(view)
        try:
            if client is not None:
                params = msgspec.structs.replace(order.params, lora=order.lora)
                done = await _served(client, params, wait, interrupts)
                traced = await _traced(client.trace, done.id) if with_trace else None
            else:
                done, traced = await _embedded(order, view, wait, interrupts, with_trace)
        except asyncio.CancelledError:
            raise Cancelled("left at once; no video was made") from None
    seconds = time.monotonic() - started
    return Outcome(done, seconds, wait.loading, client is None, wait.queued, traced)


def suggestions(order: Order, outcome: Outcome) -> list[str]:
    """Commands to try next, with all that was asked for this time; they can be pasted into a shell."""
    stem, end = os.path.splitext(shown_path(outcome.done.path))
    seed = (outcome.done.metadata["seed"] + 1) % 2**63
    again = command(order, seed=seed, output=f"{stem}-2{end}")
    onward = command(order, image=None, video=stem + end, strength=0.6, output=f"{stem}-3{end}")
    lines = [f"{again}   # another take"]
    if outcome.done.metadata.get("init", {}).get("as") != "channels":  # such a model takes no video
        lines.append(f"{onward}   # start from this one")
    if outcome.embedded:
        return [*lines, "engine serve   # keep the model loaded; the next generate uses it and starts at once"]
    words = ["engine", "list"] if order.socket is None else ["engine", "list", "--socket", str(order.socket)]
    return [*lines, f"{shlex.join(words)}   # what the engine is doing"]


def command(order: Order, **changes: object) -> str:
    """The command line of an order: its prompt, and every option that is not at its default."""
    params = msgspec.structs.replace(order.params, **changes)
    words = ["engine", "generate", params.prompt]
    for struct in (params, order):
        for field in msgspec.structs.fields(type(struct)):
            value = getattr(struct, field.name)
            if field.name in ("prompt", "params") or value == field.default:
                continue
            option = "--" + {"output": "out"}.get(field.name, field.name).replace("_", "-")
            for each in value if isinstance(value, tuple) else (value,):
                words += [option] if each is True else [option, str(each)]
    return shlex.join(words)


class Interrupts:
    """SIGINT and SIGTERM while a request runs: the first asks for its cancel, the second cancels this coroutine.

    Resource handling: the signal handlers are the loop's until the end of `with`.
    """

    def __init__(self, view: ProgressView) -> None:
        self.asked = asyncio.Event()
        self.leave_at_once: Callable[[], None] | None = None
        """What else a second signal does."""
        self._view = view
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()

    def handle_signal(self) -> None:
        if not self.asked.is_set():
            self._view.note("cancelling; once more to leave at once")
            self.asked.set()
            return
        if self.leave_at_once is not None:
            self.leave_at_once()
        if self._main is not None:
            self._main.cancel()

    def check(self) -> None:
        """Raises `Cancelled` if that was asked for before there was anything to cancel."""
        if self.asked.is_set():
            raise Cancelled("the request was cancelled")

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self.handle_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)


class Wait:
    """What a request waits for until something is computed for it: the weights of an engine that is still loading,
    which is said in place of an estimate, and then the requests before it."""

    def __init__(self, view: ProgressView) -> None:
        self.loading = 0.0
        """Seconds until the engine was up."""
        self.queued = 0.0
        """Seconds after that."""
        self._view = view
        self._began = time.monotonic()
        self._loads = False
        self._computes = False
        self._latest: Progress | None = None

    def loaded(self) -> None:
        """The engine is up: what was heard of the request meanwhile is shown now."""
        self._loads, self.loading, self._began = False, time.monotonic() - self._began, time.monotonic()
        if self._latest is not None:
            self._view.update(self._latest)

    def hear(self, progress: Progress) -> None:
        """Show how far the request is, but not while it waits for weights."""
        self._latest = progress
        if progress.phase != "queued" and not self._computes:
            self._computes = True
            if self._loads:
                self.loaded()
            self.queued = time.monotonic() - self._began
        if not self._loads:
            self._view.update(progress)

    async def look(self, client: AsyncClient) -> bool:
        """Whether the engine is loading, and nothing is computed for the request yet; shows how far it is."""
        starting = [stage for stage in (await client.status()).stages if stage.state == "starting"]
        if not starting or self._computes:
            return False
        self._loads = True
        self._view.wait_for(starting)
        return True

    async def watch(self, client: AsyncClient) -> None:
        """Look until the engine is up. If it is gone, the events of the request say so."""
        with contextlib.suppress(EngineError):
            while True:
                await asyncio.sleep(LOOK_INTERVAL)
                if not await self.look(client):
                    break
            if self._loads:
                self.loaded()


async def _served(client: AsyncClient, params: UserParams, wait: Wait, interrupts: Interrupts) -> Done:
    """On a running engine, which may still be loading its weights."""
    if not await wait.look(client):
        return await _follow(client, params, wait, interrupts)
    watching = asyncio.create_task(wait.watch(client))
    try:
        return await _follow(client, params, wait, interrupts)
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _server(order: Order) -> AsyncClient | None:
    """The running server; None if there is none. `BadConfig` if it is not the one that was asked for."""
    client = AsyncClient(order.socket)
    try:
        welcome = await client.server()
    except NotListening:
        return None
    advice = "leave that out to use it, or name a --socket where no engine listens to run a second one"
    if order.model not in (None, welcome.model):
        raise BadConfig(f"the engine at {client.socket} serves {welcome.model}, not {order.model}: {advice}")
    for option, value in (("--checkpoint", order.checkpoint), ("--placement", order.placement)):
        if value:
            raise BadConfig(f"the engine at {client.socket} is running, so {option} cannot be chosen: {advice}")
    return client


async def _embedded(
    order: Order, view: ProgressView, wait: Wait, interrupts: Interrupts, with_trace: bool
) -> tuple[Done, Traced | None]:
    """On a supervisor of our own, which is started only for a request that it will accept. All stages share a process
    unless that was asked otherwise: one request has little to overlap, and torch is loaded once instead of three
    times."""
    if names := [text for text in order.lora if EXTENSION not in text]:
        raise BadConfig(
            f"no engine is running, so --lora takes files ({EXTENSION}), not the name of an adapter: got {names[0]!r}"
        )
    chosen: dict[str, object] = {"placement": "fused"}
    chosen |= {k: v for k in ("model", "checkpoint", "lora", "placement") if (v := getattr(order, k)) is not None}
    system = decode_strictly(SystemParams, chosen, BadConfig, "the command")
    supervisor = Supervisor(system)
    await asyncio.to_thread(supervisor.check, order.params)
    interrupts.check()
    view.note(f"loading {supervisor.model.name} for this request (no engine is running)")
    interrupts.leave_at_once = supervisor.kill
    logging.getLogger(Requests.__module__).setLevel(logging.ERROR)  # how the request ends, the command says itself

    async def trace() -> Traced:
        return supervisor.trace()

    async with supervisor:
        await _load(supervisor, view, interrupts)
        wait.loaded()
        done = await _follow(supervisor, order.params, wait, interrupts)
        return done, await _traced(trace, done.id) if with_trace else None


async def _traced(trace: Callable[[], Awaitable[Traced]], identity: str) -> Traced:
    """With the last quantum of the request, of which the engine hears a moment after the file is in its place."""
    end = time.monotonic() + LAST_QUANTUM
    while True:
        traced = await trace()
        last = {span.phase: span.index for span in traced.spans if span.task == identity}
        if last.get("write") == last.get("decode") or time.monotonic() > end:
            return traced
        await asyncio.sleep(LAST_QUANTUM / 50)


async def _load(supervisor: Supervisor, view: ProgressView, interrupts: Interrupts) -> None:
    """Wait until the stages are up, showing how far they are, or until Ctrl-C."""
    ready, asked = asyncio.create_task(supervisor.ready(view.load)), asyncio.create_task(interrupts.asked.wait())
    try:
        await asyncio.wait([ready, asked], return_when=asyncio.FIRST_COMPLETED)
        interrupts.check()
        await ready
    finally:
        ready.cancel()
        asked.cancel()


async def _follow(engine: Engine, params: UserParams, wait: Wait, interrupts: Interrupts) -> Done:
    """Submit, show progress, wait for the end."""
    interrupts.check()
    accepted = await engine.submit(params)
    cancelling = asyncio.create_task(_cancel_when_asked(engine, accepted.id, interrupts.asked))
    try:
        async for event in engine.events(accepted.id):
            if isinstance(event, Done):
                return event
            if isinstance(event, Failed):
                raise from_failure(event.error)
            if not interrupts.asked.is_set():
                wait.hear(event)
    except asyncio.CancelledError:
        # Leaving at once, but not before the engine has heard of the cancel, if it still listens.
        await asyncio.wait({cancelling}, timeout=LEAVE_DEADLINE)
        raise
    finally:
        cancelling.cancel()
    raise AssertionError("events end with Done or Failed")


async def _cancel_when_asked(engine: Engine, identity: str, asked: asyncio.Event) -> None:
    await asked.wait()
    # If the engine cannot be told, the stream of events ends with the same error.
    with contextlib.suppress(EngineError):
        await engine.cancel(identity)
