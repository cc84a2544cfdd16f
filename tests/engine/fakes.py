"""Fake stages for the simulator: queues that check their bounds, and processes that behave like real ones at the
border."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from engine.events import BeginTask, Capacity, DropTask, Event, Grant, Placing, QuantumEnded, TaskDropped, TaskSpec
from ipc.errors import Failure, OutOfMemory
from ipc.messages.names import Phase, Seat, StageName, stage_of
from ipc.messages.reports import Parts
from tests.engine.observer import demand


class Nature(msgspec.Struct, kw_only=True):
    """How this world treats its processes. The default is kind: everything takes exactly as long as it is estimated
    to."""

    slowness: dict[Phase, float] = {}
    """Factor on the estimated time of a quantum."""
    jitter: tuple[float, float] = (1.0, 1.0)
    """Range of another factor, drawn for each quantum."""
    lag: float = 0.0
    """Reports are heard up to this many seconds late."""
    load: float = 0.0
    """Seconds, at most, to start a process."""
    eager: bool = True
    """Processes drop a task before they answer what was granted of it."""
    errors: float = 0.0
    """Part of the quanta that fail."""
    crashes: float = 0.0
    """Part of the quanta during which the process of some stage dies."""
    start_failures: float = 0.0
    """Part of the processes that die before they are up."""
    top: int = 0
    """The highest memory level."""
    refusals: float = 0.0
    """Part of the level changes that fail, and with them all to higher levels."""
    gone: float = 0.0
    """Part of the processes that cannot be started at all."""
    faults_until: float = 0.0
    """Processes crash, and fail to start, before this time."""


class Memory:
    """What really lies in the queues and the state slots. Every bound is checked at every put."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.prompts: set[str] = set()
        self.init_latents: set[str] = set()
        self.latents: set[str] = set()
        self.states: dict[str, int] = {}
        """Task -> steps committed."""
        self.frames: set[tuple[str, int]] = set()
        self.short: set[str] = set()
        """Tasks whose last step failed for want of memory: the next one that runs makes up for it."""

    def run(self, grant: Grant, spec: TaskSpec) -> None:
        """What a quantum of text, vae or dit does to the memory when it ends."""
        id, bounds = grant.id, self.capacity
        match grant.phase:
            case "text":
                self.prompts.add(id)
            case "encode":
                self.init_latents.add(id)
            case "denoise":
                demand(id in self.prompts and (id in self.init_latents) == spec.encode, f"{grant}: inputs are missing")
                done = self.states.get(id, 0)
                # Lost reports: what is asked for again may be committed already, as far as it was granted ahead.
                demand(done - 2 <= grant.index <= done + (id in self.short), f"{grant}: {done} steps are committed")
                self.short.discard(id)
                self.states[id] = max(done, grant.index + 1)
                if grant.index == spec.denoise - 1:
                    self.latents.add(id)
            case "decode":
                demand(id in self.latents, f"{grant}: the latents are missing")
                self.frames.add((id, grant.index))
        full = (
            len(self.prompts) > bounds.prompts or len(self.init_latents) > bounds.init_latents
            or len(self.states) > bounds.states or len(self.latents) > bounds.latents
            or len(self.frames) > bounds.frames
        )  # fmt: skip
        demand(not full, f"{grant}: a queue is full")

    def free(self, stage: StageName, id: str) -> None:
        if stage == "dit":
            self.prompts.discard(id)
            self.init_latents.discard(id)
            self.states.pop(id, None)
            self.short.discard(id)
        elif stage == "vae":
            self.latents.discard(id)
        elif stage == "writer":
            self.frames = {frame for frame in self.frames if frame[0] != id}

    def empty(self) -> bool:
        return not (self.prompts or self.init_latents or self.latents or self.states or self.frames)


class Host(Protocol):
    """The world in which a fake process lives."""

    now: float
    nature: Nature
    memory: Memory
    specs: dict[str, TaskSpec]
    parts: dict[tuple[str, Phase], int]

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None: ...
    def latency(self) -> float: ...
    def tell(self, event: Event) -> None: ...
    def begin_quantum(self, process: Process, grant: Grant) -> None: ...
    def put_in_place(self, process: Process, id: str) -> None: ...


class Process:
    """A fake process at some seats: messages first, then one quantum, then the answer.

    Tasks are dropped between two quanta: at once (`eager`), or in their turn, after what was granted before."""

    def __init__(self, world: Host, seats: tuple[Seat, ...], epoch: int) -> None:
        self.world, self.seats, self.epoch = world, seats, epoch
        self.alive = True
        self.muted = False
        """It is dead, and what it said last is not heard any more."""
        self.known: set[tuple[Seat, str]] = set()
        self.spoiled: set[tuple[Seat, str]] = set()
        """A quantum failed: those granted ahead are skipped."""
        self.files: dict[str, int] = {}
        self.parts: dict[tuple[str, Phase], int] = {}
        """Of phases that are done in parts, how many are."""
        self.skipped: set[tuple[Seat, str]] = set()
        """Is being dropped: what was granted before is answered without being run."""
        self.turns: collections.deque[Grant | DropTask] = collections.deque()
        self.running: Grant | None = None
        self.unheard: collections.deque[Event] = collections.deque()
        self.heard_until = 0.0

    def receive(self, message: BeginTask | Grant | DropTask) -> None:
        if not self.alive:
            return
        match message:
            case BeginTask(stage, id):
                self.known.add((stage, id))
            case Grant():
                self.turns.append(message)
            case DropTask(stage, id):
                self.skipped.add((stage, id))
                if self.world.nature.eager:
                    self.turns.appendleft(message)
                else:
                    self.turns.append(message)
        if self.running is None:
            self.work()

    def work(self) -> None:
        """Until a quantum runs or nothing is left to do."""
        while self.turns and self.running is None:
            turn = self.turns.popleft()
            task = (turn.stage, turn.id)
            if isinstance(turn, DropTask):
                self.drop(turn)
            elif task in self.known and task not in self.spoiled | self.skipped:
                self.running = turn
                self.world.begin_quantum(self, turn)
            else:
                self.report(QuantumEnded(turn.stage, self.epoch, turn.id, turn.phase, turn.index, dropped=True))

    def drop(self, drop: DropTask) -> None:
        task = (drop.stage, drop.id)
        demand(task in self.known, f"{drop}: it does not know the task")
        for marks in (self.known, self.spoiled, self.skipped):
            marks.discard(task)
        self.world.memory.free(stage_of(drop.stage), drop.id)
        self.parts = {key: done for key, done in self.parts.items() if drop.stage != "vae" or key[0] != drop.id}
        if drop.stage == "writer":
            self.files.pop(drop.id, None)
        self.report(TaskDropped(drop.stage, self.epoch, drop.id))

    def finish(self, grant: Grant, seconds: float, error: Failure | None) -> None:
        if not self.alive:
            return
        parts = self.part(grant) if error is None else None
        if error is None and (parts is None or not parts.left):
            self.apply(grant)
        elif error is None:
            pass
        elif error.code == OutOfMemory.code:
            if grant.phase == "denoise":
                self.world.memory.short.add(grant.id)
        elif (grant.id, grant.phase) not in self.parts:  # a part may have failed out of its turn, and is tried again
            self.spoiled.add((grant.stage, grant.id))
        self.report(
            QuantumEnded(grant.stage, self.epoch, grant.id, grant.phase, grant.index, seconds, error, parts=parts)
        )
        self.running = None
        self.work()

    def part(self, grant: Grant) -> Parts | None:
        """Do the next part of a phase that is done in parts, if one is left; how many are done."""
        key = (grant.id, grant.phase)
        total = self.world.parts.get(key)
        if total is None:
            return None
        self.parts[key] = min(self.parts.get(key, 0) + 1, total)
        return Parts(self.parts[key], total)

    def apply(self, grant: Grant) -> None:
        spec, memory = self.world.specs[grant.id], self.world.memory
        if grant.phase != "write":
            memory.run(grant, spec)
            return
        demand((grant.id, grant.index) in memory.frames, f"{grant}: the chunk is not there")
        written = self.files.get(grant.id, 0)
        demand(written == grant.index, f"{grant}: the file has {written} chunks")
        memory.frames.remove((grant.id, grant.index))
        self.files[grant.id] = grant.index + 1
        if grant.index == spec.chunks - 1:
            self.report(Placing(grant.stage, self.epoch, grant.id))
            self.world.put_in_place(self, grant.id)

    def report(self, event: Event) -> None:
        """Reports arrive in order, some time later."""
        self.heard_until = max(self.heard_until, self.world.now + self.world.latency())
        self.unheard.append(event)
        self.world.at(self.heard_until, self.hand_in)

    def hand_in(self) -> None:
        if not self.muted and self.unheard:
            self.world.tell(self.unheard.popleft())

    def knows(self, id: str, stage: StageName) -> bool:
        """It is this stage and has the task."""
        return self.alive and any(known == id and stage_of(seat) == stage for seat, known in self.known)

    def busy(self, id: str, phases: tuple[Phase, ...]) -> bool:
        """It could still put something of this task into a queue."""
        turns = [self.running, *self.turns]
        return self.alive and any(
            isinstance(turn, Grant) and turn.id == id and turn.phase in phases and (turn.stage, id) in self.known
            for turn in turns
        )
