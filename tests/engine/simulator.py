"""Histories of the scheduler with fake stages and a fake clock, all drawn from a seed.

    python -m tests.engine.simulator --seeds 0:10000      # many; prints the seed of the first that fails
    python -m tests.engine.simulator --seed 4711 --trace  # one, every event and action

The fake processes (`tests/engine/fakes.py`) answer in order, late, or never; they die between a result and its report;
they check every bound and every input. `tests/engine/observer.py` checks what the scheduler promises.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import itertools
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from engine.estimates import Policy
from engine.events import (
    Action,
    BeginTask,
    CancelAsked,
    Capacity,
    DropTask,
    Event,
    Fail,
    Finish,
    Grant,
    LevelChanged,
    Placing,
    Purge,
    RaiseLevel,
    Restart,
    StageGone,
    StageLost,
    StageUp,
    Submitted,
    TaskSpec,
    Tick,
    TokensChanged,
)
from engine.params import STAGES
from engine.scheduler import Scheduler
from ipc.errors import Failure
from ipc.messages.names import Phase, Seat, StageName, stage_of
from tests.engine.fakes import Memory, Nature, Process
from tests.engine.observer import Observer, Violation, demand

MAX_EVENTS = 20_000
"""Of one history; one that needs more does not drain."""

DEVICES: tuple[dict[Seat, str | None], ...] = (
    {"text": "gpu", "dit": "gpu", "vae": "gpu", "writer": None},
    {"text": None, "dit": "gpu", "vae": "gpu", "writer": None},
    {"text": "gpu1", "dit": "gpu0", "vae": "gpu1", "writer": None},
    {"text": "gpu2", "dit": "gpu0", "vae": "gpu1", "writer": None},
    {"text": "process", "dit": "process", "vae": "process", "writer": "process"},
)

FEEDERS: dict[StageName, tuple[Phase, ...]] = {
    "text": (), "dit": ("text", "encode"), "vae": ("denoise",), "writer": ("decode",),
}  # fmt: skip


class World:
    """Supervisor, stages, clients and time, around one scheduler."""

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy = "shortest",
        *,
        random: Random | None = None,
        nature: Nature | None = None,
        fused: bool = False,
        scheduler: type[Scheduler] = Scheduler,
        trace: bool = False,
    ) -> None:
        self.random = random or Random(0)
        self.nature = nature or Nature()
        self.now = 0.0
        self.scheduler = scheduler(capacity, policy)
        self.observer = Observer(capacity, policy)
        self.memory = Memory(capacity)
        self.capacity = capacity
        self.specs: dict[str, TaskSpec] = {}
        self.in_place: set[str] = set()
        """Tasks whose file has its name."""
        self.poison: dict[str, StageName] = {}
        """Tasks that kill the process of a stage."""
        self.hunted: dict[str, StageName] = {}
        """Tasks whose process somebody kills whenever this stage runs them."""
        self.hungry: dict[str, tuple[StageName, int]] = {}
        """Tasks that a stage has memory enough for from this level on."""
        self.parts: dict[tuple[str, Phase], int] = {}
        """Phases of tasks that the vae does in so many parts."""
        self.levels: dict[Seat, tuple[int, int]] = dict.fromkeys(capacity.devices, (0, 0))
        """The level that a seat keeps, and the highest that it can."""
        self.processes: dict[Seat, Process] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.log: list[tuple[float, Action]] = []
        self.seats = tuple(capacity.devices)
        self.groups: list[tuple[Seat, ...]] = [self.seats] if fused else [(seat,) for seat in self.seats]
        self._trace = trace
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._starting: set[tuple[Seat, ...]] = set()
        self._epoch = 0
        self._tick_at = float("inf")
        self._ghosts: list[Any] = []
        """Reports of dead processes, still to be heard."""
        self._poisonings: collections.Counter[str] = collections.Counter()
        self._denoised_at: dict[str, Seat] = {}
        self._moving_to: dict[Seat, str | None] | None = None
        """All processes leave, and those that come need these tokens."""
        for group in self.groups:
            self._start(group)

    # Clock.

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._order), what, arguments))

    def run(self) -> collections.Counter[str]:
        """Until nothing is left to happen; raises `Violation`."""
        for count in itertools.count():
            if not self._heap:
                break
            demand(count < MAX_EVENTS, "the history does not drain")
            self.now, _, what, arguments = heapq.heappop(self._heap)
            what(*arguments)
        self.observer.judge_the_end()
        demand(self.memory.empty(), f"slots have leaked: {vars(self.memory)}")
        demand(not len(self.scheduler), "tasks are remembered though all is over")
        demand(not self.scheduler.waiting and not self.scheduler.running, "tasks are counted though all is over")
        demand(not self.scheduler.check(), f"{self.scheduler.check()}")
        return self.counts

    def latency(self) -> float:
        return self.random.random() * self.nature.lag if self.nature.lag else 0.0

    # The supervisor's part.

    def tell(self, event: Event) -> None:
        """Tell the scheduler, have its actions judged, carry them out."""
        if self._trace:
            print(f"{self.now:9.3f}  {event}")
        self.counts[type(event).__name__] += 1
        self.observer.hear(event, self.now)
        actions = self.scheduler.on(event, self.now)
        if self._trace:
            print("".join(f"           -> {action}\n" for action in actions), end="")
        self.observer.judge(actions, self.now)
        for action in actions:
            self._carry_out(action)
        self._check_now_and_then()
        wakeup = self.scheduler.next_wakeup(self.now)
        if wakeup is not None and wakeup < self._tick_at:
            self._tick_at = wakeup
            self.at(wakeup, self._tick)

    def _check_now_and_then(self) -> None:
        self.counts["events"] += 1
        if self.counts["events"] % 4 == 0:
            problems = self.scheduler.check()
            demand(not problems, f"{problems}")

    def _tick(self) -> None:
        self._tick_at = float("inf")
        self.tell(Tick())

    def _carry_out(self, action: Action) -> None:
        self.log.append((self.now, action))
        match action:
            case BeginTask() | Grant() | DropTask():
                if isinstance(action, BeginTask):
                    self._check_alone(action)
                self.processes[action.stage].receive(action)
                self._haunt(action)
            case Purge(stage, id):
                self._purge(stage, id)
            case Restart(stage, delay):
                group = next(group for group in self.groups if stage in group)
                if group not in self._starting and self._moving_to is None:
                    self._starting.add(group)
                    self.at(self.now + delay, self._start, group)
            case RaiseLevel(stage, level):
                self.counts["raises"] += 1
                self.at(self.now + 0.1 + self.latency(), self._raise_level, stage, level)
            case Finish():
                self.counts["finished"] += 1
            case Fail(id, error):
                without_file = error.code in ("cancelled", "deadline_exceeded")
                demand(not (without_file and id in self.in_place), f"{action}: its file is there")
                self.counts[f"failed: {error.code}"] += 1

    def _haunt(self, action: BeginTask | Grant | DropTask) -> None:
        """Whenever a process is told of a task, it is the worst moment to hear what a dead one had to say about it."""
        for ghost in [g for g in self._ghosts if (g.stage, g.id) == (action.stage, action.id)]:
            self._ghosts.remove(ghost)
            self.at(self.now, self.tell, ghost)

    def _check_alone(self, begin: BeginTask) -> None:
        """Nobody else of this stage has the task."""
        stage = stage_of(begin.stage)
        others = [process.seats for process in self.processes.values() if process.knows(begin.id, stage)]
        demand(not others, f"{begin}: it is at {others}")
        if stage == "dit":
            self.counts["moves"] += self._denoised_at.get(begin.id, begin.stage) != begin.stage
            self._denoised_at[begin.id] = begin.stage

    def _purge(self, stage: StageName, id: str) -> None:
        knows = any(process.knows(id, stage) for process in self.processes.values())
        demand(not knows, f"{stage} is purged of {id}, which it knows")
        busy = any(process.busy(id, FEEDERS[stage]) for process in self.processes.values())
        demand(not busy, f"{stage} is purged of {id}, which is still being made for it")
        self.memory.free(stage, id)

    # Memory.

    def set_level(self, seat: Seat, level: int, top: int) -> None:
        """Of a seat, and those on its device."""
        device = self.capacity.devices[seat]
        for other in self.seats:
            if other == seat or (device is not None and self.capacity.devices[other] == device):
                self.levels[other] = (level, top)
                self.tell(LevelChanged(other, level, top))

    def _raise_level(self, seat: Seat, above: int) -> None:
        level, top = self.levels[seat]
        if level <= above < top:
            if self.random.random() < self.nature.refusals:
                self.counts["refused raises"] += 1
                top = level
            else:
                level = self.random.randint(above + 1, top)
        self.set_level(seat, level, top)

    def lower_level(self, seat: Seat) -> None:
        """Somebody has found that there is memory."""
        level, top = self.levels[seat]
        self.set_level(seat, self.random.randint(0, level), top)

    # What happens to it.

    def submit(self, spec: TaskSpec) -> None:
        self.specs[spec.id] = spec
        self.tell(Submitted(spec))

    def cancel(self, id: str) -> None:
        seen = self.observer.live.get(id)
        self.counts["late cancels"] += seen is not None and seen.placing
        self.counts["cancels after a lost file"] += seen is not None and not seen.placing and seen.lost_files > 0
        self.tell(CancelAsked(id, Failure("cancelled", "the client went away")))

    def begin_quantum(self, process: Process, grant: Grant) -> None:
        random, nature, spec = self.random, self.nature, self.specs[grant.id]
        seconds = spec.cost[grant.phase] * nature.slowness.get(grant.phase, 1.0) * random.uniform(*nature.jitter)
        if (total := self.parts.get((grant.id, grant.phase))) is not None:
            left = process.parts.get((grant.id, grant.phase), 0) < total
            seconds *= (spec.chunks if grant.phase == "decode" else 1) / total if left else 0.01
            self.counts["parts"] += left
        if self.poison.get(grant.id) == stage_of(grant.stage):
            self.at(self.now + seconds * random.random(), self._poisoned, process, grant.id)
            return
        if self.hunted.get(grant.id) == stage_of(grant.stage):
            self.at(self.now + seconds * random.random(), self._hunted, process, grant.id)
            return
        if self.now < nature.faults_until and random.random() < nature.crashes:
            self.at(self.now + seconds * random.random(), self.kill, random.choice(self.seats))
        error = Failure("numerical_error", "not finite") if random.random() < nature.errors else None
        stage, level = self.hungry.get(grant.id, (None, 0))
        if stage == stage_of(grant.stage) and self.levels[grant.stage][0] < level:
            self.counts["shortages"] += 1
            error = Failure("out_of_memory", "the device is full")
        self.at(self.now + seconds, process.finish, grant, seconds, error)

    def _poisoned(self, process: Process, id: str) -> None:
        if process.alive:
            self.counts["poisonings"] += 1
            self._die(process)
            # What was said last and not heard leaves it open who was running.
            self._poisonings[id] += not process.muted
            demand(self._poisonings[id] <= 2, f"{id} has killed {self._poisonings[id]} processes")

    def _hunted(self, process: Process, id: str) -> None:
        if process.alive:
            self.counts["hunts"] += 1
            self._die(process, outside=True)
            self._poisonings[id] += not process.muted
            demand(self._poisonings[id] <= 5, f"{id} has had {self._poisonings[id]} processes killed")

    def put_in_place(self, process: Process, id: str) -> None:
        """A file has its name; it may be the last thing that its writer does."""
        self.in_place.add(id)
        if self.now < self.nature.faults_until and self.random.random() < 2 * self.nature.crashes:
            self.at(self.now, self._die, process)

    def kill(self, seat: Seat) -> None:
        if seat in self.processes and self.processes[seat].alive:
            self.counts["kills"] += 1
            self._die(self.processes[seat], outside=self.random.random() < 0.5)

    def move(self, devices: dict[Seat, str | None]) -> None:
        """Other stages are to share a process: if all are up, all leave, each with what it has in hand."""
        if self._moving_to is not None or any(not self._is_up(seat) for seat in self.seats):
            return
        self.counts["moves of all"] += 1
        self._moving_to = devices
        for process in dict.fromkeys(self.processes.values()):
            self._die(process, asked=True)

    def _is_up(self, seat: Seat) -> bool:
        return seat in self.processes and self.processes[seat].alive

    def _begin_again(self, devices: dict[Seat, str | None]) -> None:
        """All have left."""
        self._moving_to = None
        self.capacity = msgspec.structs.replace(self.capacity, devices=devices)
        self.groups = [self.seats] if devices == DEVICES[-1] else [(seat,) for seat in self.seats]
        self.tell(TokensChanged(devices))
        for group in self.groups:
            self._start(group)

    def _die(self, process: Process, outside: bool = False, asked: bool = False) -> None:
        """What it said last is heard before its death, is lost, or comes when its successor is at the same task."""
        if not process.alive:
            return
        process.alive = False
        noticed = self.now + self.latency()
        fate = self.random.choice(("heard", "lost", "late"))
        if fate == "heard":
            noticed = max(noticed, process.heard_until)
        process.muted = fate != "heard"
        self.at(noticed, self._hear_last_words, process)
        self.at(noticed, self._lose, process.seats, process.epoch, outside, asked)
        if fate == "late":
            self._ghosts += process.unheard

    def _hear_last_words(self, process: Process) -> None:
        """What must not be lost with a process, and what its end may bring about."""
        for event in process.unheard:
            if isinstance(event, Placing):
                self.counts["last words"] += process.muted
                self.tell(event)
        if "writer" in process.seats and self.random.random() < 0.3:
            for id in [id for id, seen in self.observer.live.items() if seen.placing]:
                self.at(self.now + self.latency(), self.cancel, id)

    def _lose(self, seats: tuple[Seat, ...], epoch: int, outside: bool, asked: bool = False) -> None:
        for seat in self.random.sample(seats, len(seats)):
            self.tell(StageLost(seat, epoch, outside, asked))
        if self._moving_to is not None and not self.observer.up:
            self._begin_again(self._moving_to)

    def _start(self, seats: tuple[Seat, ...]) -> None:
        self._starting.discard(seats)
        self._epoch += 1
        random, nature = self.random, self.nature
        ready = self.now + random.uniform(0, nature.load)
        trouble = self.now < nature.faults_until
        if trouble and random.random() < nature.gone:
            self.at(ready, self._vanish, seats)
        elif trouble and random.random() < nature.start_failures:
            self.counts["start failures"] += 1
            self.at(ready, self._lose, seats, self._epoch, random.random() < 0.5)
        else:
            self.at(ready, self._come_up, Process(self, seats, self._epoch))

    def _come_up(self, process: Process) -> None:
        self.processes.update(dict.fromkeys(process.seats, process))
        for seat in process.seats:
            self.tell(StageUp(seat, process.epoch))

    def _vanish(self, seats: tuple[Seat, ...]) -> None:
        self.counts["seats gone"] += 1
        for seat in seats:
            self.tell(StageGone(seat, Failure("bad_checkpoint", "a tensor is missing; fetch it again")))


def random_world(seed: int, scheduler: type[Scheduler] = Scheduler, trace: bool = False) -> World:
    """Everything about a history that does not depend on what the scheduler does."""
    random = Random(seed)
    fused, top = random.random() < 0.25, random.choice((1, 2, 4))
    capacity = Capacity(
        devices=DEVICES[-1] if fused else _with_more_dits(random), prompts=random.randint(1, top + 1),
        init_latents=random.randint(1, top), states=random.randint(1, top), latents=random.randint(1, top),
        frames=random.randint(1, top + 1),
    )  # fmt: skip
    phases: tuple[Phase, ...] = ("text", "encode", "denoise", "decode", "write")
    nature = Nature(
        eager=random.random() < 0.5,
        slowness={phase: random.uniform(0.4, 2.0) for phase in phases}, jitter=(0.9, 1.4),
        load=random.choice((0.1, 2.0)),
        lag=random.choice((0.0, 0.0, 0.01, 0.5)),
    )  # fmt: skip
    world_policy: Policy = random.choice(("shortest", "fifo"))
    quiet = random.random() < 0.3
    if not quiet:
        nature.errors = random.choice((0.0, 0.0, 0.02))
        nature.crashes = random.choice((0.0, 0.05, 0.1, 0.2))
        nature.start_failures = random.choice((0.0, 0.0, 0.0, 0.2, 0.2, 0.95))
        nature.gone = random.choice((0.0, 0.0, 0.0, 0.05))
        nature.faults_until = 30.0
    world = World(
        capacity, world_policy, random=random, nature=nature, fused=fused, scheduler=scheduler, trace=trace
    )  # fmt: skip
    nature.top, nature.refusals = random.choice((0, 3, 3)), random.choice((0.0, 0.0, 0.3))
    for seat in world.seats:
        if seat != "writer":
            world.at(0.0, world.set_level, seat, 0, nature.top)
    for _ in range(random.choice((0, 0, 1, 5))):
        world.at(random.uniform(0, 10), world.lower_level, random.choice(world.seats))
    spread = random.choice((0.0, 2.0, 20.0))
    for number in range(random.randint(1, random.choice((2, 4, 7)))):
        _draw_task(world, f"task{number}", random.uniform(0, spread), quiet)
    for _ in range(0 if quiet else random.choice((0, 0, 0, 3))):
        world.at(random.uniform(0, 10), world.kill, random.choice(world.seats))
    for _ in range(random.choice((0, 0, 1, 4)) if world.seats == STAGES else 0):
        world.at(random.uniform(0, 10), world.move, random.choice((DEVICES[-1], random.choice(DEVICES))))
    return world


def _with_more_dits(random: Random) -> dict[Seat, str | None]:
    """Devices of all seats, with one to three dits: on devices of their own, or on that of the vae."""
    devices = dict(random.choice(DEVICES[:-1]))
    for number in range(1, random.choice((1, 1, 2, 3))):
        devices[f"dit:{number}"] = random.choice((f"gpu:{number}", f"gpu:{number}", devices["vae"]))
    return devices


def _draw_task(world: World, id: str, when: float, quiet: bool) -> None:
    random = world.random
    scale = random.choice((0.3, 1.0, 5.0))
    spec = TaskSpec(
        id=id, encode=random.random() < 0.3, denoise=random.randint(1, 4), chunks=random.choice((1, 2, 3, 5)),
        priority=random.choice((0, 0, 0, 1, -3)),
        deadline=when + random.uniform(-1, 30) * scale if random.random() < 0.15 else None,
        cost={"text": 0.05, "encode": 0.1 * scale, "denoise": 0.2 * scale, "decode": 0.1 * scale,
              "write": random.choice((0.02, 0.2)) * scale},
    )  # fmt: skip
    world.at(when, world.submit, spec)
    if not quiet and random.random() < 0.05:
        world.poison[id] = random.choice(STAGES)
    elif not quiet and random.random() < 0.05:
        world.hunted[id] = random.choice(STAGES)
    if random.random() < 0.2:
        world.hungry[id] = (random.choice(STAGES[:-1]), random.choice((1, 1, 2, 3, 4)))
    if random.random() < 0.15:
        for _ in range(random.choice((1, 2))):
            world.at(when + random.uniform(0, 4) * scale, world.cancel, id)
    for phase in ("encode", "decode"):
        if random.random() < 0.3:
            world.parts[id, phase] = random.choice((1, 2, 3, 8))


def simulate(seed: int, scheduler: type[Scheduler] = Scheduler, trace: bool = False) -> collections.Counter[str]:
    """Run one history; what happened in it, counted. A `Violation` names the seed and how to replay it."""
    try:
        return random_world(seed, scheduler, trace).run()
    except (Violation, AssertionError, KeyError, IndexError) as error:
        replay = f"python -m tests.engine.simulator --seed {seed} --trace"
        raise Violation(f"seed {seed}: {type(error).__name__}: {error}\nreplay: {replay}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:10000", metavar="FIRST:END")
    parser.add_argument("--seed", type=int, help="run only this history")
    parser.add_argument("--trace", action="store_true", help="print every event and action")
    arguments = parser.parse_args()
    first, end = (int(part) for part in arguments.seeds.split(":"))
    seeds = range(first, end) if arguments.seed is None else range(arguments.seed, arguments.seed + 1)
    counts: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    for seed in seeds:
        try:
            counts.update(simulate(seed, trace=arguments.trace))
        except Violation as violation:
            print(violation, file=sys.stderr)
            return 1
    print(f"{len(seeds)} histories, seeds {seeds.start} to {seeds.stop - 1}, {time.monotonic() - started:.1f} s")
    for name, count in sorted(counts.items()):
        print(f"{count:10} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
