"""Checkpoints, LoRAs and loading in the whole engine, with the model that ships."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine import Supervisor, SystemParams, UserParams, process
from engine.checkpoint import check_paths
from engine.display.status import print_status
from engine.models import CONFIGS, load_model
from hotreload.checkpoint import Layout
from ipc.errors import BadCheckpoint, BadConfig, BadRequest
from ipc.messages.status import LoadProgress, StageStatus
from ipc.messages.weights import Component
from tests.conftest import Video
from tools.make_checkpoint import directory_source, make_checkpoint

Wait = Callable[..., Awaitable[None]]
MODEL = load_model("wan-demo")
DIM = MODEL.transformer.dim
PROMPT = "a red circle moves left on a black background"


def ask(path: Path, **fields: Any) -> UserParams:
    small = {"height": 48, "width": 48, "num_frames": 5, "steps": 4}
    return UserParams(**{"prompt": PROMPT, "seed": 3, **small, "output": str(path), **fields})


async def make(params: SystemParams, path: Path, **fields: Any) -> dict[str, Any]:
    """A video of an engine of its own; its metadata."""
    async with Supervisor(params) as supervisor:
        return (await supervisor.generate(ask(path, **fields))).metadata


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What ships, with nothing added: the metadata of a video and its frames, as their SHA-256."""
    path = tmp_path_factory.mktemp("shipped") / "v.mp4"
    return asyncio.run(make(SystemParams(placement="fused"), path)), Video(path).sha256


def write_lora(path: Path, module: str = "diffusion_model.blocks.0.self_attn.q") -> str:
    """Rank 2, for a linear layer of the demo model."""
    torch.manual_seed(1)
    save_file({f"{module}.lora_A.weight": torch.randn(2, DIM), f"{module}.lora_B.weight": torch.randn(DIM, 2)}, path)
    return str(path)


async def test_every_layout_gives_the_same_video(tmp_path: Path, shipped: tuple[dict[str, Any], str]) -> None:
    """The demo model as a Wan repository, as ComfyUI's files and as it ships, in the same dtype: the same frames, and
    the same weight hashes in the metadata."""
    source = directory_source(CONFIGS / "demo", MODEL.components)
    layouts: tuple[Layout, ...] = ("diffusers", "original", "comfyui")
    for layout in layouts:
        make_checkpoint(MODEL, tmp_path / layout, layout, dtype=torch.float16, source=source)
        params = SystemParams(placement="fused", checkpoint=str(tmp_path / layout))
        metadata = await make(params, tmp_path / f"{layout}.mp4")
        assert metadata["weights"] == shipped[0]["weights"]
        assert Video(tmp_path / f"{layout}.mp4").sha256 == shipped[1]


async def test_loading_is_heard_of_and_shows_in_the_status() -> None:
    """While the stages start, whoever waits hears of every component, in the end all of it; `status` says what a stage
    is reading just then, and nothing once it is up."""
    heard: list[dict[str, LoadProgress]] = []
    reading: list[StageStatus] = []
    async with Supervisor(SystemParams()) as supervisor:

        def hear(components: Sequence[LoadProgress]) -> None:
            heard.append({progress.component: progress for progress in components})
            reading.extend(stage for stage in supervisor.status().stages if stage.loading is not None)

        await supervisor.ready(hear)
        assert all(stage.loading is None for stage in supervisor.status().stages)
    assert all(progress.total > 100_000 and progress.done == 0 for progress in heard[0].values())
    assert set(heard[-1]) == set(MODEL.components)
    assert all(0 < progress.done == progress.total for progress in heard[-1].values())
    shown = {(stage.name, stage.loading.component) for stage in reading if stage.loading is not None}
    # Of what is read within a turn of the loop nothing is seen.
    assert shown and shown <= {("text", "text_encoder"), ("dit", "transformer"), ("vae", "vae")}
    assert {stage.state for stage in reading} == {"starting"}


async def test_the_status_has_the_weights_and_their_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hash for each component once it is loaded, the same as in the metadata; each LoRA's name, not its directory,
    and strength; both in the table."""
    options = tuple(f"{write_lora(tmp_path / f'{name}.safetensors')}:{s}" for name, s in (("a", 0.8), ("b", -1)))
    async with Supervisor(SystemParams(placement="fused", lora=options)) as supervisor:
        assert supervisor.status().weights == {}
        metadata = (await supervisor.generate(ask(tmp_path / "v.mp4"))).metadata
        status = supervisor.status()
    assert status.weights == metadata["weights"]
    assert status.weights.keys() == set(MODEL.components)
    assert msgspec.to_builtins(status.loras) == metadata["lora"]
    assert str(tmp_path) not in msgspec.json.encode(status).decode()
    print_status(status)
    shown = capsys.readouterr().out
    assert all(content in shown for content in status.weights.values())
    assert "a.safetensors:0.8, b.safetensors:-1" in shown


async def test_a_lora_is_merged_and_named(tmp_path: Path, shipped: tuple[dict[str, Any], str]) -> None:
    """With a LoRA the frames and the transformer's hash are others, and the metadata names file and strength, not the
    directory; at strength 0 the frames are those of the model alone."""
    file = write_lora(tmp_path / "style.safetensors")
    plain, frames = shipped
    merged = await make(SystemParams(placement="fused", lora=(f"{file}:0.8",)), tmp_path / "merged.mp4")
    nothing = await make(SystemParams(placement="fused", lora=(f"{file}:0",)), tmp_path / "nothing.mp4")
    assert "lora" not in plain
    assert merged["lora"] == [{"component": "transformer", "file": "style.safetensors", "strength": 0.8}]
    assert merged["weights"]["transformer"] != plain["weights"]["transformer"]
    assert merged["weights"]["vae"] == plain["weights"]["vae"] == nothing["weights"]["vae"]
    assert Video(tmp_path / "nothing.mp4").sha256 == frames != Video(tmp_path / "merged.mp4").sha256


def test_a_lora_that_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """A key without a match is named; two files for one transformer, and something that is no strength, are the
    operator's mistakes."""
    stranger = write_lora(tmp_path / "s.safetensors", "diffusion_model.blocks.77.self_attn.q")
    with pytest.raises(BadCheckpoint, match=r"LoRA .*/s\.safetensors .*blocks\.77\.self_attn\.q\.lora_A\.weight"):
        Supervisor(SystemParams(lora=(f"{stranger}:1",)))
    file = write_lora(tmp_path / "a.safetensors")
    with pytest.raises(BadConfig, match="two files"):
        Supervisor(SystemParams(lora=(f"{file},{file}:1",)))
    with pytest.raises(BadConfig, match="not a strength"):
        Supervisor(SystemParams(lora=(f"{file}:strong",)))


def test_more_files_than_a_stage_can_be_told_of_are_refused() -> None:
    """A transformer in 4,000 shards: the size of their paths, the most it may be, and what to do."""
    shards = [f"/models/wan/transformer/diffusion_pytorch_model-{i:05}-of-04000.safetensors" for i in range(4000)]
    component = Component(name="transformer", files=shards)
    with pytest.raises(BadCheckpoint, match=r"4,000 files, whose paths take .* expected at most 98,304: merge shards"):
        check_paths([component])
    check_paths([Component(name="transformer", files=shards[:1000])])


async def test_metadata_say_how_a_video_was_made(tmp_path: Path) -> None:
    """Model, preset, noise device and the start image's name, not its directory, are in the metadata; what the preset
    stands for is in the parameters."""
    Image.new("RGB", (96, 96), "red").save(tmp_path / "a.png")
    metadata = await make(
        SystemParams(placement="fused"),
        tmp_path / "v.mp4",
        preset="distilled",
        steps=None,
        image=str(tmp_path / "a.png"),
    )
    assert metadata["model"] == "wan-demo"
    assert metadata["init"] == {"file": "a.png", "as": "start"}
    parameters = metadata["parameters"]
    assert (parameters["preset"], parameters["steps"], parameters["solver"]) == ("distilled", 4, "euler")
    assert (parameters["noise_device"], parameters["strength"], parameters["guidance_scale"]) == ("cpu", 0.8, 1.0)


def test_a_request_is_checked_before_the_engine_is_started(tmp_path: Path) -> None:
    """`check` gives the job or the refusal without starting anything."""
    supervisor = Supervisor(SystemParams())
    assert supervisor.check(ask(tmp_path / "v.mp4")).steps == 4
    with pytest.raises(BadRequest, match="computes on the CPU"):
        supervisor.check(ask(tmp_path / "v.mp4", noise_device="cuda"))


@pytest.mark.usefixtures("fresh_interpreters")
async def test_a_stage_that_stops_while_it_loads_is_replaced(monkeypatch: pytest.MonkeyPatch, wait_until: Wait) -> None:
    """SIGSTOP of the writer, a fresh interpreter, before it is up: when it has shown no progress for the start deadline
    it is replaced, and all stages come up."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.unforkable_worker")
    async with Supervisor(SystemParams(start_deadline=20.0)) as supervisor:

        def writer() -> int | None:
            return next(stage.pid for stage in supervisor.status().stages if stage.name == "writer")

        await wait_until(lambda: writer() is not None, "the writer's process")
        pid = writer()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(supervisor.ready(), 150)
        assert writer() != pid


def test_a_config_that_contradicts_the_model(tmp_path: Path) -> None:
    """The demo's weights with another number of heads in config.json, which no shape shows: refused at once."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    path = tmp_path / "demo" / "transformer" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "num_attention_heads": 1, "attention_head_dim": 192}))
    with pytest.raises(BadCheckpoint, match="num_attention_heads"):
        Supervisor(SystemParams(checkpoint=str(tmp_path / "demo")))
