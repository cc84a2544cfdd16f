"""Copies of a GPU's weights in host memory, read by the loader from the files of the model that ships."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.host_copies import HostCopies
from engine.models import CONFIGS
from engine.monitor import Sample
from engine.plans import HOST
from engine.weights import Source
from ipc.errors import BadCheckpoint, OutOfMemory
from tests.engine.gpu_crew import GPU, GpuCrew

Wait = Callable[..., Awaitable[None]]

PLENTY = Sample(at=0.0, host_available=1 << 40)


def copies_of(crew: GpuCrew, sample: Sample = PLENTY) -> tuple[HostCopies, list[bool]]:
    """And what was heard of them: whether they were complete then."""
    heard: list[bool] = []
    made: Any = HostCopies(crew.model, crew, lambda: sample, lambda: heard.append(made.complete))  # type: ignore[arg-type]
    return made, heard


async def test_everything_is_copied_and_mapped(crew: GpuCrew, wait_until: Wait) -> None:
    """In the background: each component once, with the content that the GPU has, and reloads are to place both."""
    copies, heard = copies_of(crew)
    assert not copies.complete and copies.status().state == "none"
    copies.start()
    states = set()

    def look() -> bool:
        states.add(copies.status().state)
        return bool(heard)

    await wait_until(look, "the copies")
    await copies.end()
    assert heard == [True] and copies.complete and copies.status().state == "complete"
    assert "reading" in states
    assert sorted(crew.adopted) == sorted(crew.weights.serving.items())
    assert crew.plans.places(GPU) == [GPU, HOST]


async def test_without_room_nothing_is_read(crew: GpuCrew) -> None:
    """The status says what is lacking, and reloads place what they did before."""
    copies, heard = copies_of(crew, Sample(at=0.0, host_available=1 << 20))
    with pytest.raises(OutOfMemory, match=r"do not fit .* memory levels 2 and 3 cannot be had"):
        await copies.ensure()
    assert heard == [False] and not crew.adopted
    assert copies.status().state == "none" and "do not fit" in copies.status().problem
    assert crew.plans.places(GPU) == [GPU]
    await copies.end()


async def test_a_reload_without_room_for_copies_of_its_own(crew: GpuCrew) -> None:
    """The copies are complete; then new weights come, and host memory has no room for them, too: from now on they are
    placed on the GPU only, and the status says why. With room, they are placed in both."""
    copies, heard = copies_of(crew)
    await copies.ensure()
    copies.make_way(["transformer"])
    assert crew.plans.places(GPU) == [GPU, HOST] and copies.complete
    copies._sample = lambda: Sample(at=0.0, host_available=1 << 20)
    copies.make_way(["transformer"])
    assert crew.plans.places(GPU) == [GPU]
    assert copies.problem.startswith("new weights are not copied: ") and len(heard) == 2
    await copies.end()


async def test_files_that_have_changed_are_not_taken_for_what_is_served(crew: GpuCrew, tmp_path: Path) -> None:
    """The transformer's file is that of the second revision by now."""
    other = CONFIGS / "demo" / "revision-2" / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(other, tmp_path / "t.safetensors")
    key = ("transformer", crew.weights.serving["transformer"])
    component = crew.weights.sources[key].component
    assert component is not None
    changed = msgspec.structs.replace(component, files=[str(tmp_path / "t.safetensors")])
    crew.weights.sources[key] = Source("demo", changed)
    copies, _ = copies_of(crew)
    with pytest.raises(BadCheckpoint, match="the files of the transformer have changed since they were loaded"):
        await copies.ensure()
    assert crew.placed.find(HOST, *key) is None and not copies.complete
    await copies.end()


async def test_what_a_program_gave_cannot_be_copied(crew: GpuCrew) -> None:
    key = ("vae", crew.weights.serving["vae"])
    crew.weights.sources[key] = Source("given in memory", None)
    copies, _ = copies_of(crew)
    with pytest.raises(BadCheckpoint, match="the vae was given by a program"):
        await copies.ensure()
    await copies.end()


async def test_only_what_is_missing_is_read(crew: GpuCrew, wait_until: Wait) -> None:
    """Ended in the middle, as for a hand-over: what is there stays, and the rest comes with the next start."""
    copies, heard = copies_of(crew)
    copies.start()
    await wait_until(lambda: crew.adopted, "the first copy")
    await copies.end()
    first = list(crew.adopted)
    again, heard = copies_of(crew)
    again.start()
    await wait_until(lambda: heard, "the others")
    await again.end()
    assert again.complete and crew.adopted.count(first[0]) == 1
