"""What must be true of any history: an independent account of events and actions, kept beside the scheduler.

It knows nothing of how the scheduler decides. It raises `Violation` at the first action that breaks a promise.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.estimates import AGEING, BEGINNING, PRIORITY_SECONDS, Policy
from engine.events import (
    Action,
    BeginTask,
    CancelAsked,
    Capacity,
    DeclareFailed,
    DropTask,
    Event,
    Fail,
    Finish,
    Grant,
    LevelChanged,
    Placing,
    Purge,
    QuantumEnded,
    Report,
    Restart,
    StageGone,
    StageLost,
    StageUp,
    Submitted,
    TaskDropped,
    TaskSpec,
    TokensChanged,
)
from engine.params import STAGES
from ipc.messages.names import STAGE_OF_PHASE, Phase, Seat, StageName, stage_of

SLOWEST = 3.0
"""The simulator's quanta take at most this many times what they are estimated to."""


class Violation(AssertionError):
    """The scheduler broke a promise."""


def demand(condition: object, message: str) -> None:
    if not condition:
        raise Violation(message)


@dataclass(slots=True, eq=False)
class Seen:
    """A task, as the events and actions tell of it."""

    spec: TaskSpec
    arrived: float
    total: dict[Phase, int]
    done: dict[Phase, int]
    granted: dict[Phase, int]
    overtaken: float = 0.0
    """Seconds computed for tasks that came later."""
    found: dict[str, float] = field(default_factory=dict)
    """Those that were there when it came, and by how much they had been overtaken then."""
    begun: bool = False
    short: dict[Phase, int] = field(default_factory=dict)
    """The level at which the next quantum of a phase has failed for want of memory."""
    unfinished: set[Phase] = field(default_factory=set)
    """Phases of which parts are left to do, as the stage has said."""
    rewinding: bool = False
    """The writer died over its file; decoding starts over when nothing of it is outstanding."""
    ended: Action | None = None
    cancelled: bool = False
    placing: bool = False
    """The writer has been given the last chunk, and lives, or has begun to put the file in place."""
    in_place: bool = False
    """A writer has begun to put the file in place."""
    lost_files: int = 0
    """Writers that have died with the last chunk before they had begun to."""
    errors: list[str] = field(default_factory=list)
    crashes: int = 0
    kills: list[tuple[Phase, int]] = field(default_factory=list)
    """The quantum of the last kill from outside, as often as it was killed in a row."""

    @property
    def poisoned(self) -> bool:
        return self.crashes >= 2 or len(self.kills) >= 5

    def complete(self, phase: Phase) -> bool:
        return self.done[phase] == self.total[phase]

    def lacks(self, phase: Phase, level: int) -> bool:
        """Memory, at this level, or an answer to what was granted ahead; an answer about its last part."""
        waits = self.granted[phase] > self.done[phase]
        return (phase in self.short and (level <= self.short[phase] or waits)) or (phase in self.unfinished and waits)

    def needs(self, stage: StageName) -> bool:
        return any(STAGE_OF_PHASE[p] == stage and not self.complete(p) for p in self.total)


class Observer:
    """Follows one history."""

    def __init__(self, capacity: Capacity, policy: Policy) -> None:
        self.capacity, self.policy = capacity, policy
        self.seats = tuple(capacity.devices)
        self.up: dict[Seat, int] = {}
        self.outstanding: dict[Seat, collections.deque[Grant]] = {seat: collections.deque() for seat in self.seats}
        self.told: set[tuple[Seat, str]] = set()
        self.dropping: set[tuple[Seat, str]] = set()
        self.tasks: dict[str, Seen] = {}
        self.live: dict[str, Seen] = {}
        self.failed: set[Seat] = set()
        self.levels: dict[Seat, tuple[int, int]] = dict.fromkeys(self.seats, (0, 0))
        """The memory level that a seat keeps, and the highest that it can."""
        self.forgiven = False
        """The last process that was lost had come up and was killed from outside: its restart does not count."""
        self.restarts: dict[Seat, list[float]] = {seat: [] for seat in self.seats}
        self.limits: dict[str, int] = {
            "prompts": capacity.prompts, "init_latents": capacity.init_latents, "states": capacity.states,
            "latents": capacity.latents, "frames": capacity.frames,
        }  # fmt: skip
        self.held: dict[str, set[Any]] = {slots: set() for slots in self.limits}
        self._hear_devices(capacity.devices)

    def _hear_devices(self, devices: dict[Seat, str | None]) -> None:
        groups = collections.defaultdict(list)
        for seat, device in devices.items():
            groups[device or f"none:{seat}"].append(seat)
        self.groups: list[list[Seat]] = list(groups.values())

    @property
    def hopeless(self) -> list[StageName]:
        """Stages all of whose seats have failed."""
        return [name for name in STAGES if all(seat in self.failed for seat in self.seats if stage_of(seat) == name)]

    def seat(self, id: str, stage: StageName) -> Seat | None:
        """Where the task is known, of those that are this stage."""
        found = [seat for seat, known in self.told | self.dropping if known == id and stage_of(seat) == stage]
        demand(len(found) <= 1, f"{id} is at {' and '.join(sorted(found))}")
        return found[0] if found else None

    # Events.

    def hear(self, event: Event, now: float) -> None:
        """An event that the scheduler is about to be told."""
        match event:
            case QuantumEnded():
                self._hear_ended(event)
            case TaskDropped(stage, epoch, id) if self.up.get(stage) == epoch:
                self.dropping.remove((stage, id))
                self._free(stage_of(stage), id)
            case Submitted(spec):
                total: dict[Phase, int] = {
                    "text": 1, "encode": int(spec.encode), "denoise": spec.denoise, "decode": spec.chunks,
                    "write": spec.chunks,
                }  # fmt: skip
                seen = Seen(spec, now, total, dict.fromkeys(total, 0), dict.fromkeys(total, 0))
                seen.found = {id: other.overtaken for id, other in self.live.items()}
                self.tasks[spec.id] = self.live[spec.id] = seen
            case CancelAsked(id):
                self.tasks[id].cancelled = self.tasks[id].cancelled or not self.tasks[id].placing
            case Placing(stage, epoch, id) if self.up.get(stage) == epoch:
                self.tasks[id].in_place = True
            case StageUp(stage, epoch):
                self.up[stage] = epoch
            case StageLost(stage, epoch, outside, asked):
                sharing = [s for s in self.up if self.up[s] == epoch]
                self.forgiven = (outside or asked) and stage in sharing
                if stage in sharing:
                    self._hear_lost(sharing, outside, asked)
            case TokensChanged(devices):
                demand(not self.up, f"{self.up} are up while the tokens change")
                self._hear_devices(devices)
                self.restarts = {seat: [] for seat in self.seats}
            case StageGone(stage):
                self.failed.add(stage)
            case LevelChanged(stage, level, top):
                self.levels[stage] = (level, top)
                for known, id in self.told:
                    if known == stage and id in self.live:
                        self._hear_of_level(self.live[id], stage_of(stage), top)

    def _hear_of_level(self, seen: Seen, stage: StageName, top: int) -> None:
        """A task whose quantum has failed at the highest level must fail."""
        if any(STAGE_OF_PHASE[phase] == stage and top <= level for phase, level in seen.short.items()):
            seen.errors.append("out_of_memory")

    def _hear_ended(self, event: QuantumEnded) -> None:
        if self.up.get(event.stage) != event.epoch:
            return
        grant = self.outstanding[event.stage].popleft()
        demand((grant.id, grant.phase, grant.index) == (event.id, event.phase, event.index), "answers out of order")
        seen = self.tasks[event.id]
        if event.parts is not None:
            seen.short.pop(event.phase, None)
            (seen.unfinished.add if event.parts.left else seen.unfinished.discard)(event.phase)
        unfinished = event.parts is not None and event.parts.left
        if (unfinished or event.index != seen.done[event.phase]) and not seen.ended:
            # Unfinished, or granted ahead of one that was, or that failed for want of memory.
            seen.granted[event.phase] -= 1
            for id in seen.found.keys() & self.live.keys() if event.parts is not None else ():
                self.live[id].overtaken += event.seconds
            return
        if event.error is not None and event.error.code == "out_of_memory" and not seen.ended:
            self._hear_of_shortage(seen, event)
            return
        if event.error is not None:
            seen.errors.append(event.error.code)
        if event.error is None and not event.dropped:
            seen.done[event.phase] = event.index + 1
            seen.short.pop(event.phase, None)
            for id in seen.found.keys() & self.live.keys():
                self.live[id].overtaken += event.seconds
            if event.phase == "write" and not seen.ended:
                self.held["frames"].discard((event.id, event.index))

    def _hear_of_shortage(self, seen: Seen, event: QuantumEnded) -> None:
        """It may have another try at a higher level, if there is one, and it had none at this one."""
        (level, top), before = self.levels[event.stage], seen.short.get(event.phase, -1)
        seen.granted[event.phase] -= 1
        if level >= top or level <= before:
            seen.errors.append("out_of_memory")
        seen.short[event.phase] = max(level, before)

    def _hear_lost(self, stages: list[Seat], outside: bool, asked: bool) -> None:
        for grant in [self.outstanding[s][0] for s in stages if self.outstanding[s] and not asked]:
            seen, where = self.tasks[grant.id], (grant.phase, grant.index)
            seen.crashes += not outside
            if outside:
                seen.kills = [*seen.kills, where] if where in seen.kills[-1:] else [where]
        for seen in self.live.values() if "writer" in stages else ():
            seen.rewinding = seen.rewinding or seen.granted["write"] > 0
            seen.lost_files += seen.placing and not seen.in_place
            seen.placing = seen.in_place
        for stage in stages:
            del self.up[stage]
            for grant in self.outstanding[stage]:
                seen = self.tasks[grant.id]
                seen.granted[grant.phase] = seen.done[grant.phase]
            self.outstanding[stage].clear()
        for stage, id in self.told:
            if stage in stages and id in self.live:
                seen = self.live[id]
                seen.short = {p: lack for p, lack in seen.short.items() if STAGE_OF_PHASE[p] != stage_of(stage)}
                seen.unfinished = {p for p in seen.unfinished if STAGE_OF_PHASE[p] != stage_of(stage)}
        for known in (self.told, self.dropping):
            known.difference_update([entry for entry in known if entry[0] in stages])

    def _free(self, stage: StageName, id: str) -> None:
        if stage == "dit":
            for slots in ("prompts", "init_latents", "states"):
                self.held[slots].discard(id)
        elif stage == "vae":
            self.held["latents"].discard(id)
        elif stage == "writer":
            self.held["frames"] -= {entry for entry in self.held["frames"] if entry[0] == id}

    # Actions.

    def judge(self, actions: Iterable[Action], now: float) -> None:
        """What the scheduler wants done about the last event."""
        for action in actions:
            match action:
                case Grant():
                    self._judge_grant(action)
                case BeginTask(stage, id):
                    demand(stage in self.up, f"{action}: the stage is down")
                    where = self.seat(id, stage_of(stage))
                    demand(where is None, f"{action}: told before, at {where}")
                    self.told.add((stage, id))
                case DropTask(stage, id):
                    demand((stage, id) in self.told, f"{action}: never told, or dropped before")
                    self.told.remove((stage, id))
                    self.dropping.add((stage, id))
                case Purge(stage, id):
                    demand(self.seat(id, stage) is None, f"{action}: the stage could do it itself")
                    self._free(stage, id)
                    if stage == "writer" and id in self.live:
                        seen = self.live[id]
                        seen.rewinding = False
                        seen.done["decode"] = seen.done["write"] = seen.granted["decode"] = seen.granted["write"] = 0
                case Report(id, _, step, steps, seconds_left):
                    demand(id in self.live, f"{action}: the task is over")
                    demand(0 <= step <= steps and steps > 0, f"{action}: no such step")
                    demand(seconds_left is not None and 0 <= seconds_left < 1e6, f"{action}: no such time")
                case Finish(id) | Fail(id):
                    self._judge_end(action, self.live.pop(id, None), now)
                case Restart(stage):
                    self._judge_restart(stage, now)
                case DeclareFailed(stage):
                    self.failed.add(stage)
        self._judge_bounds()
        self._judge_progress(now)

    def _judge_grant(self, grant: Grant) -> None:
        seen = self.live.get(grant.id)
        demand(seen is not None, f"{grant}: the task is over")
        assert seen is not None
        phase, queue = grant.phase, self.outstanding[grant.stage]
        demand(grant.stage in self.up, f"{grant}: the stage is down")
        demand((grant.stage, grant.id) in self.told, f"{grant}: the stage was not told of the task")
        demand(not seen.poisoned, f"{grant}: the task is poisoned")
        demand(grant.index == seen.granted[phase], f"{grant}: expected index {seen.granted[phase]}")
        demand(grant.index < seen.total[phase], f"{grant}: there are only {seen.total[phase]}")
        demand(self._inputs_done(seen, phase), f"{grant}: its input is not there")
        demand(not seen.lacks(phase, self.levels[grant.stage][0]), f"{grant}: it must wait")
        demand(not (seen.rewinding and grant.stage in ("vae", "writer")), f"{grant}: the old frames are not purged")
        if not seen.begun:
            self._judge_turn(seen)
        seen.begun = True
        seen.placing = seen.placing or (phase == "write" and grant.index == seen.total["write"] - 1)
        seen.granted[phase] += 1
        queue.append(grant)
        self._hold(seen, grant)

    def _hold(self, seen: Seen, grant: Grant) -> None:
        match grant.phase:
            case "text" | "encode":
                self.held["prompts"].add(grant.id)
                if seen.spec.encode:
                    self.held["init_latents"].add(grant.id)
            case "denoise":
                self.held["states"].add(grant.id)
                if grant.index == seen.spec.denoise - 1:
                    self.held["latents"].add(grant.id)
            case "decode":
                self.held["frames"].add((grant.id, grant.index))

    def _inputs_done(self, seen: Seen, phase: Phase) -> bool:
        match phase:
            case "denoise":
                return seen.complete("text") and seen.complete("encode")
            case "decode":
                return seen.complete("denoise")
            case "write":
                return seen.granted["write"] < seen.done["decode"]
        return True

    def _judge_turn(self, chosen: Seen) -> None:
        """The first grant of a task: nobody who waits has a better right."""
        for other in self.live.values():
            if other.begun or other is chosen:
                continue
            if self.policy == "fifo":
                ahead = (-other.spec.priority, other.arrived) < (-chosen.spec.priority, chosen.arrived)
            else:
                work = SLOWEST * sum(other.total[p] * cost for p, cost in other.spec.cost.items())
                levels = max(0, chosen.spec.priority - other.spec.priority)
                bound = (BEGINNING * work + PRIORITY_SECONDS * levels) / AGEING
                ahead = chosen.found.get(other.spec.id, 0.0) > bound
            demand(not ahead, f"{chosen.spec.id} is let in before {other.spec.id}, which has been overtaken enough")

    def _judge_end(self, action: Finish | Fail, seen: Seen | None, now: float) -> None:
        demand(seen is not None, f"{action}: a second end")
        assert seen is not None
        seen.ended = action
        if isinstance(action, Finish):
            demand(seen.complete("write"), f"{action}: not all chunks are written")
            return
        deadline = seen.spec.deadline
        legitimate = {
            "cancelled": seen.cancelled,
            "deadline_exceeded": deadline is not None and deadline <= now and not seen.placing,
            "stage_failed": any(seen.needs(stage) for stage in self.hopeless),
            "poisoned_request": seen.poisoned,
        }
        demand(legitimate.get(action.error.code) or action.error.code in seen.errors, f"{action}: without a cause")

    def _judge_restart(self, stage: Seat, now: float) -> None:
        if self.forgiven:
            return
        self.restarts[stage].append(now)
        recent = [time for time in self.restarts[stage] if now - time < 60]
        demand(len(recent) <= 5, f"{stage} is restarted {len(recent)} times within 60 s")

    def _judge_bounds(self) -> None:
        for slots, holders in self.held.items():
            demand(len(holders) <= self.limits[slots], f"{slots}: {len(holders)} of {self.limits[slots]} are held")
        for stages in self.groups:
            busy = [stage for stage in stages if self.outstanding[stage]]
            demand(len(busy) <= 1, f"{busy} share a device")
            demand(all(len(self.outstanding[stage]) <= 2 for stage in busy), f"{busy}: more than two outstanding")

    def _judge_progress(self, now: float) -> None:
        """Nobody is left who must have ended; no device idles while a task could go on there."""
        hopeless = self.hopeless
        for id, seen in self.live.items():
            deadline = seen.spec.deadline
            stopped = seen.cancelled or (deadline is not None and deadline <= now)
            overdue = seen.errors or seen.poisoned or (stopped and not seen.placing)
            demand(not overdue, f"{id} should have failed")
            demand(not any(seen.needs(stage) for stage in hopeless), f"{id} waits for a failed stage")
            waits = seen.granted["decode"] > seen.done["decode"]
            demand(not seen.rewinding or waits, f"{id} should start over decoding")
        for stages in self.groups:
            if not any(self.outstanding[stage] for stage in stages):
                for stage in stages:
                    if stage in self.up and stage != "text":
                        idle = next((id for id, seen in self.live.items() if self._could_run(id, seen, stage)), None)
                        demand(idle is None, f"{stage} idles while {idle} could go on")

    def _could_run(self, id: str, seen: Seen, seat: Seat) -> bool:
        stage = stage_of(seat)
        if stage == "dit":
            index = seen.granted["denoise"]
            return (
                self.seat(id, stage) in (seat, None)
                and not seen.lacks("denoise", self.levels[seat][0])
                and index < seen.spec.denoise
                and self._inputs_done(seen, "denoise")
                and (id in self.held["states"] or len(self.held["states"]) < self.limits["states"])
                and (index < seen.spec.denoise - 1 or len(self.held["latents"]) < self.limits["latents"])
            )
        if stage == "vae":
            index = seen.granted["decode"]
            return (
                seen.complete("denoise")
                and not seen.lacks("decode", self.levels[seat][0])
                and not seen.rewinding
                and index < seen.spec.chunks
                and ((id, index) in self.held["frames"] or len(self.held["frames"]) < self.limits["frames"])
            )
        return not seen.rewinding and seen.granted["write"] < seen.done["decode"]

    def judge_the_end(self) -> None:
        """Nothing is under way any more."""
        demand(not self.live, f"nothing happens any more, but {sorted(self.live)} have not ended")
        demand(not self.told, f"never told to drop: {sorted(self.told)}")
        demand(not self.dropping, f"never answered: {sorted(self.dropping)}")
        held = {slots: holders for slots, holders in self.held.items() if holders}
        demand(not held, f"slots are held though all is over: {held}")
