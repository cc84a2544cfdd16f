"""The whole engine on CUDA, with the model that ships: close to the CPU's video, the same after a crash."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Supervisor, SystemParams, UserParams

pytestmark = pytest.mark.gpu

PROMPT = "a red circle moves left on a black background"
Wait = Callable[..., Awaitable[None]]


def ask(path: Path, **fields: Any) -> UserParams:
    return UserParams(**{"prompt": PROMPT, "seed": 3, "output": str(path), **fields})


def cuda(**fields: Any) -> SystemParams:
    return SystemParams(device="cuda", **fields)


def psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Of two uint8 videos, in dB."""
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


async def make(params: SystemParams, path: Path, **fields: Any) -> None:
    async with Supervisor(params) as supervisor:
        await supervisor.generate(ask(path, **fields))
        assert not supervisor.check_integrity()


async def test_a_video_on_cuda_is_that_of_the_cpu(tmp_path: Path, read_video: Any) -> None:
    """One seed on the CPU, on CUDA in float32 and in bfloat16: the same picture, 40 and 35 dB apart or closer (bfloat16
    on the CPU: 50)."""
    await make(SystemParams(device="cpu"), tmp_path / "cpu.mp4")
    await make(cuda(dtype="float32"), tmp_path / "float32.mp4")
    await make(cuda(), tmp_path / "bfloat16.mp4")
    frames = {name: read_video(tmp_path / f"{name}.mp4").frames for name in ("cpu", "float32", "bfloat16")}
    assert float(frames["cpu"].std()) > 10
    assert psnr(frames["float32"], frames["cpu"]) >= 40
    assert psnr(frames["bfloat16"], frames["cpu"]) >= 35


async def test_placement_does_not_change_a_byte_on_cuda(tmp_path: Path, read_video: Any) -> None:
    """The same seed split, fused, and again split, on CUDA: identical frames."""
    await make(cuda(), tmp_path / "split.mp4")
    await make(cuda(placement="fused"), tmp_path / "fused.mp4")
    await make(cuda(), tmp_path / "again.mp4")
    hashes = {read_video(tmp_path / f"{name}.mp4").sha256 for name in ("split", "fused", "again")}
    assert len(hashes) == 1


async def test_a_killed_dit_on_cuda_resumes(tmp_path: Path, read_video: Any, wait_until: Wait) -> None:
    """SIGKILL of the dit in the middle of 60 steps on CUDA: it comes back, goes on from its last step, and makes the
    frames of an undisturbed run."""
    async with Supervisor(cuda()) as supervisor:
        await supervisor.generate(ask(tmp_path / "calm.mp4", steps=60))
        task = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4", steps=60)))

        def in_the_middle() -> bool:
            return any(t.phase == "denoise" and t.step >= 5 for t in supervisor.tasks() if t.state == "running")

        await wait_until(in_the_middle, "denoising")
        stage = next(s for s in supervisor.status().stages if s.name == "dit")
        assert stage.pid is not None
        quanta = stage.quanta
        os.kill(stage.pid, signal.SIGKILL)
        await asyncio.wait_for(task, 120)
        after = next(s for s in supervisor.status().stages if s.name == "dit")
        assert after.restarts == 1
        assert after.quanta - quanta < 60, "it went on where it was"
        assert not supervisor.check_integrity()
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256


async def test_noise_drawn_on_cuda(tmp_path: Path, read_video: Any) -> None:
    """noise_device cuda: another video than cpu for the same seed, and the same one twice."""
    async with Supervisor(cuda()) as supervisor:
        for name, device in (("cpu", "cpu"), ("first", "cuda"), ("again", "cuda")):
            await supervisor.generate(ask(tmp_path / f"{name}.mp4", noise_device=device))
    cpu, first, again = (read_video(tmp_path / f"{name}.mp4") for name in ("cpu", "first", "again"))
    assert first.sha256 == again.sha256
    assert psnr(first.frames, cpu.frames) < 25


async def test_video_to_video_on_cuda(tmp_path: Path, read_video: Any) -> None:
    """A video encoded on CUDA and denoised with a small strength keeps its picture."""
    async with Supervisor(cuda()) as supervisor:
        await supervisor.generate(ask(tmp_path / "a.mp4"))
        await supervisor.generate(ask(tmp_path / "b.mp4", video=str(tmp_path / "a.mp4"), strength=0.2, seed=5))
    assert psnr(read_video(tmp_path / "b.mp4").frames, read_video(tmp_path / "a.mp4").frames) > 30
