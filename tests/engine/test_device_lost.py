"""A CUDA error after which every call of the process fails: the stage is replaced, and its task goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams, UserParams, process


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
async def test_only_the_stage_that_met_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_video: Any, device: str
) -> None:
    """At the dit's third step: its process ends, the next one goes on from the second, the frames are those of an
    undisturbed run, and no other stage was restarted."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.faulty_worker")
    monkeypatch.setenv("FAULT", str(tmp_path / "fault"))
    async with Supervisor(SystemParams(device=device)) as supervisor:

        async def make(name: str) -> str:
            await supervisor.generate(UserParams(prompt="a red circle", seed=3, steps=6, output=str(tmp_path / name)))
            return str(read_video(tmp_path / name).sha256)

        calm = await make("calm.mp4")
        (tmp_path / "fault").touch()
        before = {stage.name: stage.quanta for stage in supervisor.status().stages}
        assert await make("faulty.mp4") == calm
        stages = {stage.name: stage for stage in supervisor.status().stages}
    assert not (tmp_path / "fault").exists()
    assert {name: stage.restarts for name, stage in stages.items()} == {"text": 0, "dit": 1, "vae": 0, "writer": 0}
    assert stages["dit"].quanta - before["dit"] == 6, "no step was run twice"
