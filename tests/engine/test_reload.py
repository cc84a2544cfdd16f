"""Live reload of weights on the whole engine, with both revisions of the model that ships."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from ipc.errors import BadCheckpoint, BadConfig, CanaryFailed, NotFound
from ipc.messages import Canary, Reload
from tests.conftest import Video, until

PROMPT = "a red circle moves left on a black background"
FIRST = CONFIGS / "demo"
SECOND = FIRST / "revision-2"


def ask(path: Path, **fields: Any) -> UserParams:
    return UserParams(**{"prompt": PROMPT, "seed": 3, "steps": 4, "num_frames": 9, "output": str(path), **fields})


def order(directory: Path = SECOND, *components: str, **fields: Any) -> Reload:
    return Reload(ref=0, checkpoint=str(directory), components=list(components or ("transformer",)), **fields)


@asynccontextmanager
async def engine() -> AsyncIterator[Supervisor]:
    async with Supervisor(SystemParams(model="wan-demo", device="cpu")) as supervisor:
        await supervisor.ready()
        yield supervisor
        assert supervisor.check_integrity() == []


def denoising(supervisor: Supervisor, step: int) -> bool:
    return any(t.state == "running" and t.phase == "denoise" and t.step >= step for t in supervisor.tasks())


async def video(supervisor: Supervisor, path: Path, **fields: Any) -> Video:
    done = await supervisor.generate(ask(path, **fields))
    return Video(done.path)


async def test_reload_and_rollback(tmp_path: Path) -> None:
    """A reload gives what a cold start with that checkpoint gives; a rollback what was before; the same content again
    is recognised; old memory is freed."""
    cold = tmp_path / "cold"
    shutil.copytree(FIRST, cold, ignore=shutil.ignore_patterns("revision-2"))
    shutil.copytree(SECOND / "transformer", cold / "transformer", dirs_exist_ok=True)
    async with Supervisor(SystemParams(model="wan-demo", device="cpu", checkpoint=str(cold))) as other:
        second = (await video(other, tmp_path / "cold.mp4")).sha256
    async with engine() as supervisor:
        first = await video(supervisor, tmp_path / "1.mp4")
        before = supervisor.status().weights
        assert first.sha256 != second
        done = await supervisor.reload(order())
        assert set(done.weights) == {"transformer"}
        after = await video(supervisor, tmp_path / "2.mp4")
        assert after.sha256 == second
        assert supervisor.status().weights == {**before, **done.weights}
        again = await supervisor.reload(order())
        assert again.weights == {} and again.unchanged == done.weights
        assert [h.generation for h in supervisor.memory() if h.name == "transformer"] == [done.weights["transformer"]]
        back = await supervisor.rollback()
        assert back.weights == {"transformer": before["transformer"]}
        assert (await video(supervisor, tmp_path / "3.mp4")).sha256 == first.sha256
        assert {v.content for v in supervisor.versions() if v.state == "serving"} == set(before.values())


async def test_running_requests_finish_on_what_they_began_with(tmp_path: Path) -> None:
    async with engine() as supervisor:
        golden = await video(supervisor, tmp_path / "golden.mp4", steps=30)
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "old.mp4", steps=30)))
        await until(lambda: denoising(supervisor, 3), "the third step")
        done = await supervisor.reload(order())
        states = {v.state for v in supervisor.versions() if v.component == "transformer"}
        old = await running
        assert Video(old.path).sha256 == golden.sha256
        assert old.metadata["weights"]["transformer"] != done.weights["transformer"]
        if done.running:
            assert states == {"serving", "previous"}
        new = await supervisor.generate(ask(tmp_path / "new.mp4", steps=30))
        assert Video(new.path).sha256 != golden.sha256
        assert new.metadata["weights"]["transformer"] == done.weights["transformer"]


async def test_now_changes_running_requests_and_says_so(tmp_path: Path) -> None:
    """Twice at the same step gives the same bytes, also when the dit is killed after the change."""
    async with engine() as supervisor:
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "mixed.mp4", steps=60)))
        await until(lambda: denoising(supervisor, 3), "the third step")
        done = await supervisor.reload(order(when="now"))
        mixed = (await running).metadata
        (change,) = mixed["weight_changes"]
        assert change["content"] == done.weights["transformer"] and 2 < change["step"] < 60
        assert mixed["weights"]["transformer"] != change["content"]


@pytest.mark.parametrize("fault", ["truncated", "missing", "nan"])
async def test_a_bad_checkpoint_changes_nothing(tmp_path: Path, fault: str) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(SECOND, tmp_path / "bad")
    file = tmp_path / "bad" / "transformer" / "diffusion_pytorch_model.safetensors"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        tensors = load_file(file)
        if fault == "missing":
            del tensors["proj_out.bias"]
        else:
            tensors["proj_out.bias"][3] = float("nan")
        save_file(tensors, file)
    async with engine() as supervisor:
        first = await video(supervisor, tmp_path / "1.mp4")
        before = supervisor.memory()
        with pytest.raises(
            BadCheckpoint,
            match={"truncated": "cut|truncated|bytes", "missing": "proj_out.bias", "nan": "proj_out.bias"}[fault],
        ):
            await supervisor.reload(order(tmp_path / "bad"))
        assert supervisor.memory() == before
        assert (await video(supervisor, tmp_path / "2.mp4")).sha256 == first.sha256


async def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    async with engine() as supervisor:
        with pytest.raises(BadConfig, match="no unet"):
            await supervisor.reload(order(SECOND, "unet"))
        with pytest.raises(NotFound, match="nothing was reloaded"):
            await supervisor.rollback()
        with pytest.raises(BadConfig):
            await supervisor.reload(order(tmp_path / "nowhere"))


async def test_canary(tmp_path: Path) -> None:
    """New weights whose video is not the one that was expected are not served; one that is, they are."""
    async with engine() as supervisor:
        await video(supervisor, tmp_path / "first.mp4")
        params = msgspec.Raw(msgspec.msgpack.encode(ask(tmp_path / "canary.mp4")))
        wrong = Canary(params=params, reference=str(tmp_path / "first.mp4"), psnr=60.0)
        before = supervisor.status().weights
        with pytest.raises(CanaryFailed, match="dB"):
            await supervisor.reload(order(canary=wrong))
        assert supervisor.status().weights == before
        right = Canary(params=params, reference=str(tmp_path / "canary.mp4"), psnr=60.0)
        shutil.copy(tmp_path / "canary.mp4", tmp_path / "expected.mp4")
        right = msgspec.structs.replace(right, reference=str(tmp_path / "expected.mp4"))
        assert (await supervisor.reload(order(canary=right))).weights
        assert (await video(supervisor, tmp_path / "after.mp4")).sha256 == Video(tmp_path / "expected.mp4").sha256


async def test_of_two_reloads_the_last_wins(tmp_path: Path) -> None:
    from ipc.errors import Superseded

    async with engine() as supervisor:
        first = asyncio.create_task(supervisor.reload(order()))
        await asyncio.sleep(0.2)
        second = await supervisor.reload(order(FIRST))
        with pytest.raises(Superseded):
            await first
        assert second.weights == {} and second.unchanged
