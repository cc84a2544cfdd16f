"""Who goes first, and how long it takes: the policies at work, on fake stages that take as long as they are estimated
to."""

from __future__ import annotations

import pytest

from engine.estimates import AGEING, BEGINNING
from engine.events import BeginTask, DropTask, Grant
from tests.engine.scheduling import FOUR_DEVICES, ONE_GPU, Stages, capacity, ends, grants, task
from tests.engine.simulator import World


def test_measured_times_correct_the_estimates() -> None:
    """Steps take three times what was estimated: after one of them, the estimate of all tasks has followed."""
    s = Stages()
    s.submit(task("a", denoise=10))
    s.submit(task("b", denoise=10))
    s.ended("a", "text", seconds=0.1)
    s.ended("a", "denoise", 0, seconds=3.0)
    assert s.scheduler.seconds_left("a") == pytest.approx(27.4)
    assert s.scheduler.seconds_left("b") == pytest.approx(27.4 + 30.5)


def test_a_draft_overtakes_films() -> None:
    """Ten films of a hundred seconds are in line when a draft of three seconds comes: it is done after its own work
    and at most two steps of a film, with text on the GPU or beside it."""
    for devices in (ONE_GPU, FOUR_DEVICES):
        world = World(capacity(devices))
        for number in range(10):
            world.submit(task(f"film{number}", denoise=100))
        world.at(150.0, world.submit, task("draft", denoise=5, step=0.5))
        world.run()
        assert ends(world)["draft"] < 150 + 2 + 0.1 + 2.5 + 0.6


def test_equal_tasks_run_one_after_another() -> None:
    """Equal tasks that come while others run are denoised in the order of arrival, none interrupted, though every
    quantum takes a little more or less than the last."""
    world = World(capacity())
    world.nature.jitter = (0.7, 1.4)
    for number in range(5):
        world.at(number * 0.5, world.submit, task(f"task{number}", denoise=8))
    world.run()
    assert grants(world, "dit") == [f"task{number}" for number in range(5) for _ in range(8)]


def test_fifo_takes_tasks_as_they_come() -> None:
    """Under fifo a draft waits for the film before it, unless its priority is higher."""
    world = World(capacity(), "fifo")
    world.submit(task("film", denoise=50))
    world.at(5.0, world.submit, task("draft", denoise=2))
    world.at(5.0, world.submit, task("urgent", denoise=2, priority=1))
    world.run()
    end = ends(world)
    assert end["urgent"] < 10 < end["film"] < end["draft"]


def drafts_without_end(world: World) -> None:
    """A film, and drafts that come faster than they can be done, for eight minutes."""
    world.at(0.0, world.submit, task("film", denoise=60))
    for number in range(500):
        world.at(float(number), world.submit, task(f"draft{number}", denoise=1, step=0.8, chunks=1))


def test_a_film_is_not_starved_by_drafts() -> None:
    """The film ends: once it has been overtaken by its bound, no newcomer goes before it."""
    world = World(capacity())
    drafts_without_end(world)
    world.run()
    bound = BEGINNING * 60.5 / AGEING
    assert 60 < ends(world)["film"] < 1.2 * bound + 60.5


def test_without_ageing_starvation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before: without ageing the same film waits until no more drafts come."""
    monkeypatch.setattr("engine.estimates.AGEING", 0.0)
    world = World(capacity())
    drafts_without_end(world)
    world.run()
    assert ends(world)["film"] > 500


def test_the_dit_never_waits_for_text() -> None:
    """With a device of their own each, text and vae overlap the dit: after the first prompt, the dit works without a
    pause, and the whole takes little longer than its steps."""
    world = World(capacity(FOUR_DEVICES))
    for number in range(6):
        world.submit(task(f"task{number}", denoise=4, step=0.25, chunks=2))
    world.run()
    assert max(ends(world).values()) == pytest.approx(0.1 + 6 * 4 * 0.25 + 0.4 + 0.1)


def test_nothing_is_put_before_the_next_stage_of_the_best_task() -> None:
    """On one device the last step of a task is outstanding, and another task could take a step. It is not granted
    ahead: the best task is decoded first."""
    s = Stages()
    s.submit(task("a", denoise=1))
    s.submit(task("b", denoise=9))
    assert s.ended("a", "text") == [DropTask("text", "a"), BeginTask("dit", "a"), Grant("dit", "a", "denoise", 0)]
    assert Grant("vae", "a", "decode", 0) in s.ended("a", "denoise")
