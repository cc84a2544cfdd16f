"""What a canary tells apart before new weights are served, and that nobody gets them meanwhile."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from ipc.errors import CanaryFailed
from ipc.messages.client import Canary
from tests.conftest import Video, until
from tests.engine.reloading import FILES, FIRST, ask, denoising, engine, order, placed, video


def canary_of(path: Path, **fields: object) -> Canary:
    """A request for a video there."""
    return Canary(params=msgspec.Raw(msgspec.msgpack.encode(ask(path, **fields))))


async def test_a_reference(tmp_path: Path) -> None:
    """New weights whose video is not the one that was expected are not served; one that is, they are."""
    async with engine() as supervisor:
        first = supervisor.status().weights["transformer"]
        await supervisor.generate(ask(tmp_path / "first.mp4"))
        canary = canary_of(tmp_path / "canary.mp4")
        wrong = msgspec.structs.replace(canary, reference=str(tmp_path / "first.mp4"), psnr=60.0)
        with pytest.raises(CanaryFailed, match="dB"):
            await supervisor.reload(order(canary=wrong))
        assert supervisor.status().weights["transformer"] == first
        await until(lambda: placed(supervisor)["transformer"] == [first], "what failed is let go of")
        shutil.copy(tmp_path / "canary.mp4", tmp_path / "expected.mp4")
        right = msgspec.structs.replace(wrong, reference=str(tmp_path / "expected.mp4"))
        (second,) = (await supervisor.reload(order(canary=right))).weights.values()
        assert second != first
        assert Video(tmp_path / "expected.mp4").sha256 == await video(supervisor, tmp_path / "v.mp4")


async def test_nobody_gets_what_is_tried(tmp_path: Path) -> None:
    """While the canary is made, another request is, too: with the weights that are served."""
    async with engine() as supervisor:
        before = supervisor.status().weights
        golden = await video(supervisor, tmp_path / "v.mp4")
        canary = canary_of(tmp_path / "canary.mp4", steps=400, priority=-10)
        trying = asyncio.create_task(supervisor.reload(order(canary=canary)))
        await until(lambda: denoising(supervisor, 1), "the canary's first step")
        done = await supervisor.generate(ask(tmp_path / "v.mp4", priority=10))
        assert not trying.done()
        assert done.metadata["weights"] == before
        assert Video(done.path).sha256 == golden
        await trying
        assert await video(supervisor, tmp_path / "v.mp4") != golden


@pytest.mark.parametrize(
    ("component", "last", "value", "says"),
    [
        ("vae", "decoder.conv_out.weight", 0.0, "the canary shows nothing"),
        ("transformer", "proj_out.weight", 3e38, "failed with the new weights: .* not finite"),
    ],
)
async def test_weights_that_are_of_no_use(tmp_path: Path, component: str, last: str, value: float, says: str) -> None:
    """A decoder that gives one colour, a transformer whose values overflow: each is a whole checkpoint with finite
    values, which only the canary finds out."""
    file = shutil.copytree(FIRST, tmp_path / "c", ignore=shutil.ignore_patterns("revision-2")) / FILES[component]
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    tensors[last].fill_(value)
    save_file(tensors, file)
    async with engine() as supervisor:
        before, golden = supervisor.status().weights, await video(supervisor, tmp_path / "v.mp4")
        with pytest.raises(CanaryFailed, match=says):
            await supervisor.reload(order(tmp_path / "c", component, canary=canary_of(tmp_path / "canary.mp4")))
        assert supervisor.status().weights == before
        assert await video(supervisor, tmp_path / "v.mp4") == golden
