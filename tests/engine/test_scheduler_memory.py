"""Quanta that have not enough memory: tried again at the next level, or the end of their task."""

from __future__ import annotations

from engine.events import DropTask, Fail, Grant, LevelChanged, RaiseLevel
from ipc.errors import Failure
from tests.engine.scheduling import Stages, task

FULL = Failure("out_of_memory", "the dit stage ran out of memory (2.00 GiB were asked for)")


def denoising(top: int = 3) -> Stages:
    """One task, whose first step is done; the second and the third are granted."""
    stages = Stages()
    stages.tell(LevelChanged("dit", 0, top))
    stages.submit(task("a", denoise=4))
    stages.ended("a", "text")
    assert stages.ended("a", "denoise", 0) == [Grant("dit", "a", "denoise", 2)]
    return stages


def test_the_quantum_is_granted_again_at_the_next_level() -> None:
    """Step 1 fails, and step 2, granted ahead, is answered as if all were well: the level is asked to rise, both are
    granted again when it has, 1 alone, and the task goes on."""
    stages = denoising()
    assert stages.ended("a", "denoise", 1, error=FULL) == [RaiseLevel("dit", 0)]
    assert stages.tell(LevelChanged("dit", 1, 3)) == [], "step 2 is outstanding"
    assert stages.ended("a", "denoise", 2) == [Grant("dit", "a", "denoise", 1)]
    assert stages.ended("a", "denoise", 1) == [Grant("dit", "a", "denoise", 2), Grant("dit", "a", "denoise", 3)]


def test_each_level_is_tried_once_and_the_last_failure_is_the_end() -> None:
    """With two levels above: two more tries, then the error of the stage, as it said it."""
    stages = denoising(top=2)
    assert stages.ended("a", "denoise", 1, error=FULL) == [RaiseLevel("dit", 0)]
    stages.ended("a", "denoise", 2, error=FULL)
    for level in (1, 2):
        assert stages.tell(LevelChanged("dit", level, 2)) == [Grant("dit", "a", "denoise", 1)]
        last = stages.ended("a", "denoise", 1, error=FULL)
        assert last == [RaiseLevel("dit", 1)] if level == 1 else last[0] == Fail("a", FULL)
    assert DropTask("dit", "a") in last


def test_a_level_that_cannot_rise() -> None:
    """The answer says that there is no higher level after all: the task fails with what the stage said."""
    stages = denoising()
    stages.ended("a", "denoise", 1, error=FULL)
    assert stages.tell(LevelChanged("dit", 0, 0))[0] == Fail("a", FULL)


def test_without_levels_it_fails_at_once() -> None:
    stages = denoising(top=0)
    assert stages.ended("a", "denoise", 1, error=FULL)[0] == Fail("a", FULL)


def test_a_level_that_fell_before_the_next_try_is_asked_to_rise_again() -> None:
    """It rose while step 2 was outstanding, and was lowered before that was answered."""
    stages = denoising()
    stages.ended("a", "denoise", 1, error=FULL)
    stages.tell(LevelChanged("dit", 1, 3))
    assert stages.tell(LevelChanged("dit", 0, 3)) == [RaiseLevel("dit", 0)]
    assert stages.ended("a", "denoise", 2, error=FULL) == []
    assert stages.tell(LevelChanged("dit", 2, 3)) == [Grant("dit", "a", "denoise", 1)]


def test_a_new_process_tries_at_the_level_that_holds() -> None:
    """The dit dies while its task waits for a higher level: the next process is granted the step as any other."""
    stages = denoising()
    stages.ended("a", "denoise", 1, error=FULL)
    stages.lost("dit")
    granted = stages.up("dit", 9)
    assert Grant("dit", "a", "denoise", 1) in granted and Grant("dit", "a", "denoise", 2) in granted


def test_chunks_of_frames_keep_their_slots() -> None:
    """The vae fails at its second chunk, with the third granted ahead: both are granted again, into the slots that they
    have, and the writer gets every chunk once."""
    stages = Stages()
    stages.tell(LevelChanged("vae", 0, 3))
    stages.denoised(task("a", chunks=4))
    stages.ended("a", "decode", 0)
    assert stages.ended("a", "decode", 1, error=FULL) == [RaiseLevel("vae", 0)]
    stages.ended("a", "decode", 2)
    assert stages.tell(LevelChanged("vae", 1, 3)) == [Grant("vae", "a", "decode", 1)]
    assert Grant("writer", "a", "write", 1) not in stages.ended("a", "write", 0)
    granted = stages.ended("a", "decode", 1)
    assert [a for a in granted if isinstance(a, Grant)] == [
        Grant("writer", "a", "write", 1), Grant("vae", "a", "decode", 2), Grant("vae", "a", "decode", 3)
    ]  # fmt: skip
