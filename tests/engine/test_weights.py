"""Weights that stay when the process that read them is gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from engine.weights import WeightStore
from ipc.messages.names import StageName
from ipc.messages.weights import WeightVersion

Wait = Callable[..., Awaitable[None]]


def version(component: str) -> WeightVersion:
    return WeightVersion(component=component, content="c", fingerprint="f", bytes=4096)


def test_the_store_owns_its_descriptors() -> None:
    """A version that is replaced or let go, and all that are left at the end, are closed; what is asked for is found,
    where it is."""
    before = set(os.listdir("/proc/self/fd"))
    store = WeightStore()
    for name in ("vae", "transformer", "vae"):
        store.keep("cpu", version(name), os.memfd_create(name))
    store.keep("cuda:1", version("transformer"), os.memfd_create("transformer"))
    assert [v.component for v, _ in store.of("cpu", ["vae", "text_encoder"])] == ["vae"]
    assert [v.component for v, _ in store.of("cuda:1", ["vae", "transformer"])] == ["transformer"]
    assert {(p.device, p.version.component) for p in store} == {
        ("cpu", "vae"), ("cpu", "transformer"), ("cuda:1", "transformer")
    }  # fmt: skip
    assert len(set(os.listdir("/proc/self/fd")) - before) == 3
    assert store.find("cpu", "vae", "c") is not None and store.find("cuda:1", "vae", "c") is None
    store.let_go("transformer", "c")
    assert [p.version.component for p in store] == ["vae"]
    assert len(set(os.listdir("/proc/self/fd")) - before) == 1
    store.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("placement", ["split", "fused"])
async def test_a_restart_reads_no_file(tmp_path: Path, read_video: Any, wait_until: Wait, placement: Any) -> None:
    """The checkpoint is deleted once it is loaded; then dit, vae and text are killed in the middle of a request: they
    come back with the same weights, and the frames are the same."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")

    def ask(name: str) -> UserParams:
        return UserParams(prompt="a red circle moves left", seed=3, steps=6, output=str(tmp_path / name))

    def pid(stage: StageName) -> int | None:
        return next(s.pid for s in supervisor.status().stages if s.name == stage)

    params = SystemParams(checkpoint=str(tmp_path / "demo"), placement=placement)
    async with Supervisor(params) as supervisor:
        calm = await supervisor.generate(ask("calm.mp4"))
        for folder in ("transformer", "vae", "text_encoder"):
            shutil.rmtree(tmp_path / "demo" / folder)
        task = asyncio.create_task(supervisor.generate(ask("v.mp4")))
        await wait_until(lambda: any(t.step >= 2 for t in supervisor.tasks() if t.state == "running"), "denoising")
        for process in {pid(stage) for stage in ("dit", "vae", "text")} - {None}:
            os.kill(process, signal.SIGKILL)  # type: ignore[arg-type]
        done = await asyncio.wait_for(task, 120)
        again = await asyncio.wait_for(supervisor.generate(ask("again.mp4")), 120)
    assert calm.metadata["weights"] == done.metadata["weights"] == again.metadata["weights"]
    hashes = {read_video(tmp_path / name).sha256 for name in ("calm.mp4", "v.mp4", "again.mp4")}
    assert len(hashes) == 1
