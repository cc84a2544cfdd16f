"""An allocation that fails, the Nth of a request, for N from the first to the last: the quantum is done again, at the
next memory level, or at the highest when there is memory again, and leaves the same bytes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.reports import Parts
from ipc.messages.stage import Run
from stages.dit import Denoising, DitStage
from stages.models import vae_plain_tiles
from stages.models.vae_tiles import Costs, Cut, Tile, tiles
from stages.stage import Stage
from stages.text import TextStage
from tests.stages.rig import TWO_EXPERTS, Rig, is_empty, make_checkpoint, make_job
from tests.stages.test_dit import put_prompts
from tests.stages.test_vae import put_latents, take

LEVELS = [MemoryPlan(), MemoryPlan(level=1), MemoryPlan(level=2), *(MemoryPlan(level=3, blocks=n) for n in (1, 0))]
Rise: TypeAlias = tuple[MemoryPlan, MemoryPlan]
"""The plan that an allocation fails with, and the one that the quantum is done again with."""
RISES: list[Rise] = [*itertools.pairwise(LEVELS), (LEVELS[-1], LEVELS[-1])]
Made: TypeAlias = list[Tensor]


class Lacking(TorchDispatchMode):
    """Of the storages that torch makes within it, all uses together, the `number`th does not fit."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    @property
    def has_failed(self) -> bool:
        return self._left <= 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(tensor.untyped_storage()._cdata not in given and tensor.device.type != "meta" for tensor in made):
            self._left -= 1
            if self._left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return out


def done(stage: Stage, runs: Sequence[Run], lacking: Lacking, rise: Rise) -> None:
    """These quanta, each until no part is left; what fails is done again, as the supervisor would have it."""
    before, after = rise
    for run in runs:
        while True:
            try:
                with contextlib.nullcontext() if lacking.has_failed else lacking:
                    parts = stage.step(run)
            except torch.OutOfMemoryError:
                if after != before:
                    stage.set_memory(after, [])
                continue
            if not isinstance(parts, Parts) or not parts.left:
                break


def sweep(stage: Stage, rise: Rise, request: Callable[[Lacking], Made], every: int, least: int) -> None:
    """Requests of which one allocation fails each, of every `every` one, another one at each rise; until there is none
    left, which must be `least` at least. All leave what an undisturbed one does."""
    expected = request(Lacking(0))
    for number in itertools.count(1 + RISES.index(rise) * every // len(RISES), every):
        stage.set_memory(rise[0], [])
        lacking = Lacking(number)
        made = request(lacking)
        assert len(made) == len(expected) and all(map(torch.equal, made, expected)), f"allocation {number}, {rise}"
        if not lacking.has_failed:
            assert number > least * every, "a sweep that fails nothing proves nothing"
            return


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lacking"), TWO_EXPERTS)


@pytest.fixture
def rig(checkpoint: Path) -> Iterator[Rig]:
    with Rig(checkpoint, TWO_EXPERTS) as rig:
        yield rig


def runs_of(job: Job, phase: Any, count: int) -> list[Run]:
    return [Run(id=job.id, phase=phase, index=index) for index in range(count)]


@pytest.mark.parametrize("rise", RISES, ids=str)
def test_a_prompt(rig: Rig, rise: Rise) -> None:
    stage = rig.load("text")
    assert isinstance(stage, TextStage)

    def embedded(lacking: Lacking) -> Made:
        job = make_job()
        stage._kept.clear()
        stage.begin(job)
        done(stage, runs_of(job, "text", 1), lacking, rise)
        stage.drop(job.id)
        return [take(rig, "prompts", job, sequence) for sequence in range(2)]

    sweep(stage, rise, embedded, every=3, least=25)
    assert is_empty(rig)


def denoised(rig: Rig, stage: Stage, rise: Rise, lacking: Lacking) -> Made:
    job = make_job(steps=3, guidance_scale_2=2.0)
    put_prompts(rig, job)
    stage.begin(job)
    done(stage, runs_of(job, "denoise", 3), lacking, rise)
    stage.drop(job.id)
    return [take(rig, "latents", job)]


@pytest.mark.parametrize("rise", RISES, ids=str)
def test_steps_of_both_experts(rig: Rig, rise: Rise) -> None:
    stage = rig.load("dit")
    sweep(stage, rise, partial(denoised, rig, stage, rise), every=37, least=12)
    assert is_empty(rig)


def test_a_step_that_leaves_something_when_it_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a dit that changes its latents before it has all that the step needs."""
    advance = DitStage._advance

    def hasty(stage: DitStage, task: Denoising) -> None:
        task.latents.mul_(1.01)
        advance(stage, task)

    monkeypatch.setattr(DitStage, "_advance", hasty)
    stage = rig.load("dit")
    with pytest.raises(AssertionError, match="allocation"):
        sweep(stage, RISES[1], partial(denoised, rig, stage, RISES[1]), every=37, least=12)


@pytest.mark.parametrize("rise", RISES, ids=str)
def test_a_clip(rig: Rig, rise: Rise, monkeypatch: pytest.MonkeyPatch) -> None:
    def four(height: int, width: int, costs: Costs, budget: int, cut: Cut) -> list[Tile]:
        return list(tiles(height, width, 2, 2, costs.reach, cut))

    monkeypatch.setattr(vae_plain_tiles, "plan", four)
    stage = rig.load("vae")

    def decoded(lacking: Lacking) -> Made:
        job = make_job()
        put_latents(rig, job)
        stage.begin(job)
        done(stage, runs_of(job, "decode", 2), lacking, rise)
        frames = [take(rig, "frames", job, index) for index in range(2)]
        stage.drop(job.id)
        return frames

    sweep(stage, rise, decoded, every=97, least=3)
    assert is_empty(rig)
