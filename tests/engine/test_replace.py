"""New processes for old ones while requests run."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from ipc.errors import StageFailed
from tests.conftest import Video, until


def ask(path: Path, **fields: Any) -> UserParams:
    asked = {"prompt": "a red circle moves left", "seed": 3, "steps": 30, "num_frames": 9, "output": str(path)}
    return UserParams(**{**asked, **fields})


def denoising(supervisor: Supervisor, step: int) -> bool:
    return any(t.state == "running" and t.phase == "denoise" and t.step >= step for t in supervisor.tasks())


def pids(supervisor: Supervisor) -> dict[str, int | None]:
    return {stage.name: stage.pid for stage in supervisor.status().stages}


def restarts(supervisor: Supervisor) -> dict[str, int]:
    return {stage.name: stage.restarts for stage in supervisor.status().stages}


@pytest.mark.parametrize("placement", ["split", "fused"])
async def test_every_process_is_replaced_under_a_request(tmp_path: Path, placement: Any) -> None:
    """The files of the weights are gone: a new process maps what is placed. The frames are the same, nothing is left
    behind. In the status that is no restart, as it is when a process dies."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("revision-2"))
    params = SystemParams(device="cpu", checkpoint=str(tmp_path / "demo"), placement=placement)
    async with Supervisor(params) as supervisor:
        golden = Video((await supervisor.generate(ask(tmp_path / "calm.mp4"))).path)
        for folder in ("transformer", "vae", "text_encoder"):
            shutil.rmtree(tmp_path / "demo" / folder)
        old, held = pids(supervisor), supervisor.memory()
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
        await until(lambda: denoising(supervisor, 3), "the third step")
        replaced = await supervisor.replace_stages()
        new = pids(supervisor)
        assert new == replaced.pids and not set(new.values()) & set(old.values())
        done = await asyncio.wait_for(running, 120)
        assert Video(done.path).sha256 == golden.sha256
        assert [(h.name, h.generation) for h in supervisor.memory()] == [(h.name, h.generation) for h in held]
        assert not supervisor.check_integrity()
        assert restarts(supervisor) == dict.fromkeys(old, 0), "what was asked for is no restart"
        os.kill(new["dit"] or 0, signal.SIGKILL)
        await until(lambda: pids(supervisor)["dit"] not in (None, new["dit"]), "a new dit")
        await supervisor.ready()
        died = restarts(supervisor)
        assert died["dit"] == 1 and sum(died.values()) == (4 if placement == "fused" else 1)
        await supervisor.replace_stages(["dit"])
        assert restarts(supervisor) == died


@pytest.mark.parametrize("unfit", ["import", "nan"])
async def test_one_that_is_not_fit_does_not_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfit: str
) -> None:
    """The old process goes on with its request, and the operator is told why; a later, fit one takes over."""
    async with Supervisor(SystemParams(device="cpu")) as supervisor:
        await supervisor.ready()
        old = pids(supervisor)
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
        await until(lambda: denoising(supervisor, 1), "the first step")
        with monkeypatch.context() as broken:
            broken.setattr("engine.process.WORKER", "tests.engine.unfit_worker")
            broken.setenv("UNFIT", unfit)
            broken.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            with pytest.raises(
                StageFailed, match="the old one goes on.*" + ("exit code 1" if unfit == "import" else "finite")
            ):
                await supervisor.replace_stages(["dit"])
        assert pids(supervisor) == old
        await asyncio.wait_for(running, 120)
        replaced = await supervisor.replace_stages(["dit"])
        assert replaced.pids["dit"] != old["dit"] and set(replaced.pids) == {"dit"}
