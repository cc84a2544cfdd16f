"""Requests that meet a fault, on the whole engine with the model that ships: each ends with its own error, and nobody
else notices. The faults are in `request_faults_worker`; a request meets them by its seed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from engine import (
    EngineError,
    NumericalError,
    OutOfMemory,
    PoisonedRequest,
    Supervisor,
    SystemParams,
    UserParams,
    process,
    records,
    scheduler,
)
from ipc.messages.names import STAGE_OF_PHASE, Phase
from ipc.messages.status import StageStatus
from tests.conftest import Video

pytestmark = pytest.mark.timeout(900)

Wait = Callable[..., Awaitable[None]]
Fault = tuple[str, Phase, int]
"""What happens, and before which quantum: a name in `request_faults_worker`, a phase, an index."""

STEPS = 6
GOOD = 3
"""A seed that meets no fault."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PLACES: dict[int, tuple[Phase, int]] = {11: ("text", 0), 12: ("denoise", 2), 13: ("decode", 1), 14: ("write", 1)}
"""Seeds, and where their requests meet their fault: in each stage once."""


class Engine:
    """An engine whose requests meet faults, and the videos it makes in a folder."""

    def __init__(self, supervisor: Supervisor, folder: Path, wait_until: Wait) -> None:
        self.supervisor, self.folder = supervisor, folder
        self.until = partial(wait_until, timeout=180.0)

    def ask(self, seed: int, name: str, steps: int = STEPS) -> UserParams:
        output = str(self.folder / f"{name}.mp4")
        return UserParams(prompt="a red circle moves left", seed=seed, steps=steps, output=output)

    async def frames(self, seed: int, name: str, steps: int = STEPS) -> str:
        """The SHA-256 of a request's frames."""
        return Video((await self.supervisor.generate(self.ask(seed, name, steps))).path).sha256

    async def error(self, seed: int) -> EngineError:
        """What a request fails with; no file of it is there. AssertionError if it is called done."""
        try:
            done = await self.supervisor.generate(self.ask(seed, "faulty"))
        except EngineError as error:
            assert not list(self.folder.glob("*faulty*")), "a failed request has left a file"
            return error
        raise AssertionError(f"{Path(done.path).name} is called done")

    def stage(self, name: str) -> StageStatus:
        return next(stage for stage in self.supervisor.status().stages if stage.name == name)

    def restarts(self) -> dict[str, int]:
        return {stage.name: stage.restarts for stage in self.supervisor.status().stages}

    def is_denoising(self) -> bool:
        """In the middle."""
        return any(task.phase == "denoise" and task.step >= 2 for task in self.supervisor.tasks())

    async def everything_given_back(self) -> None:
        """No slot of a queue, no state; the accounts are in order."""
        await self.until(lambda: {holding.state for holding in self.supervisor.memory()} == {"placed"}, "empty slots")
        await self.until(lambda: not self.supervisor.check_integrity(), "accounts in order")


Faulty = Callable[..., contextlib.AbstractAsyncContextManager[Engine]]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait) -> Faulty:
    """Starts an engine whose requests of these seeds meet these faults."""

    @contextlib.asynccontextmanager
    async def start(faults: Mapping[int, list[Fault]], device: str = "cpu") -> AsyncIterator[Engine]:
        monkeypatch.setattr(process, "WORKER", "tests.engine.request_faults_worker")
        monkeypatch.setenv("REQUEST_FAULTS", json.dumps(faults))
        async with Supervisor(SystemParams(device=device)) as supervisor:
            await supervisor.ready()
            yield Engine(supervisor, tmp_path, wait_until)

    return start


async def poisoned_beside_another(engine: Engine, seed: int) -> str:
    """While a request is denoised, another one kills its stage until it is set aside. The SHA-256 of the first one's
    frames."""
    before, victim = engine.restarts(), STAGE_OF_PHASE[PLACES[seed][0]]
    neighbour = asyncio.create_task(engine.frames(GOOD, f"neighbour-{seed}", steps=20))
    await engine.until(engine.is_denoising, "denoising")
    poisoned = asyncio.create_task(engine.error(seed))
    await engine.until(lambda: engine.stage(victim).state != "up", f"the death of {victim}")
    assert not neighbour.done(), "the neighbour was done before anything happened"
    error = await poisoned
    assert isinstance(error, PoisonedRequest), f"{victim}: {error!r}"
    assert f"died 2 times of this request, the last time {victim}" in str(error)
    frames = await neighbour
    await engine.until(lambda: engine.stage(victim).state == "up", f"the return of {victim}")
    assert engine.restarts() == before | {victim: before[victim] + 2}
    return frames


async def test_a_request_that_kills_its_stage_twice_is_set_aside(faulty: Faulty) -> None:
    """A segmentation fault in each stage in turn, whenever it runs a certain quantum of one request: two processes die
    of it, then it fails as poisoned. The request beside it, which is in the middle of denoising, has the frames of an
    undisturbed run, no other stage is restarted, and the next request is served."""
    async with faulty({seed: [("crash", *place)] for seed, place in PLACES.items()}) as engine:
        calm = await engine.frames(GOOD, "calm", steps=20)
        assert calm != await engine.frames(GOOD + 1, "other", steps=20), "frames tell one video from another"
        for seed in PLACES:
            assert await poisoned_beside_another(engine, seed) == calm
        assert await engine.frames(GOOD, "next", steps=20) == calm
        await engine.everything_given_back()


@pytest.mark.parametrize("device", DEVICES)
async def test_latents_that_are_not_finite_are_an_error_that_names_the_step(faulty: Faulty, device: str) -> None:
    """One of the latents is NaN before the third step: the request fails and names it, leaves no file and no state; the
    next one has the frames of the one before, from the same processes."""
    async with faulty({12: [("spoil", "denoise", 2)]}, device) as engine:
        calm = await engine.frames(GOOD, "calm")
        error = await engine.error(12)
        assert isinstance(error, NumericalError)
        assert str(error).startswith(f"step 3 of {STEPS} gave values that are not finite; ")
        assert await engine.frames(GOOD, "next") == calm
        assert set(engine.restarts().values()) == {0}
        await engine.everything_given_back()


@pytest.mark.parametrize("device", DEVICES)
async def test_a_stage_without_memory_fails_that_request_alone(faulty: Faulty, device: str) -> None:
    """An allocation fails in each stage in turn, at the first quantum or in the middle: the request fails; its error
    names the stage; the next one has the frames of the one before, from the same processes."""
    async with faulty({seed: [("allocate", *place)] for seed, place in PLACES.items()}, device) as engine:
        calm = await engine.frames(GOOD, "calm")
        for seed, (phase, _) in PLACES.items():
            error = await engine.error(seed)
            assert isinstance(error, OutOfMemory)
            assert str(error).startswith(f"the {STAGE_OF_PHASE[phase]} stage ran out of memory")
            assert await engine.frames(GOOD, f"next-{seed}") == calm
        assert set(engine.restarts().values()) == {0}
        await engine.everything_given_back()


# Controls.


async def test_a_request_that_is_not_set_aside_is_found(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that forgives every crash: the stage is given up in the end, and the other request with it."""
    monkeypatch.setattr(scheduler, "CRASHES", 1000)
    monkeypatch.setattr(records, "RESTART_DELAYS", (0.0, 0.0))
    async with faulty({14: [("crash", *PLACES[14])]}) as engine:
        with pytest.raises(AssertionError, match="writer: StageFailed"):
            await poisoned_beside_another(engine, 14)


async def test_a_black_video_and_an_error_of_no_kind_are_found(faulty: Faulty) -> None:
    """Stages that do not look at their values make a video of NaN, all black, and it is called done. One that does not
    know its allocator's error says no more than that it failed."""
    black: list[Fault] = [("overlook", "denoise", 0), ("spoil", "denoise", 2), ("overlook", "decode", 0)]
    lacking: list[Fault] = [("misjudge", "write", 0), ("allocate", "write", 0)]
    async with faulty({12: black, 14: lacking}) as engine:
        with pytest.raises(AssertionError, match=r"faulty\.mp4 is called done"):
            await engine.error(12)
        assert not Video(engine.folder / "faulty.mp4").frames.max()
        (engine.folder / "faulty.mp4").unlink()
        error = await engine.error(14)
        assert not isinstance(error, OutOfMemory) and "MemoryError" in str(error)
