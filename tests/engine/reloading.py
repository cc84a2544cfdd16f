"""What the tests of reloads share: the two revisions of the model that ships, variations of it, requests, an engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from ipc.messages.client import Reload
from tests.conftest import Video

PROMPT = "a red circle moves left on a black background"
FIRST = CONFIGS / "demo"
SECOND = FIRST / "revision-2"
FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def ask(path: Path, **fields: Any) -> UserParams:
    small = {"seed": 3, "steps": 4, "num_frames": 5, "height": 32, "width": 32}
    return UserParams(**{"prompt": PROMPT, "output": str(path), **small, **fields})


def order(directory: Path = SECOND, *components: str, **fields: Any) -> Reload:
    return Reload(ref=0, checkpoint=str(directory), components=list(components or ("transformer",)), **fields)


@asynccontextmanager
async def engine(**params: Any) -> AsyncIterator[Supervisor]:
    async with Supervisor(SystemParams(model="wan-demo", device="cpu", threads=1, **params)) as supervisor:
        await supervisor.ready()
        yield supervisor
        assert supervisor.check_integrity() == []


async def video(supervisor: Supervisor, path: Path, **fields: Any) -> str:
    """SHA-256 of the frames; the file is gone then."""
    done = await supervisor.generate(ask(path, **fields))
    digest = await asyncio.to_thread(lambda: Video(done.path).sha256)
    path.unlink()
    return digest


def denoising(supervisor: Supervisor, step: int) -> bool:
    return any(t.state == "running" and t.phase == "denoise" and t.step >= step for t in supervisor.tasks())


def placed(supervisor: Supervisor) -> dict[str, list[str]]:
    """Component -> content hashes of the versions in memory."""
    found: dict[str, list[str]] = {}
    for holding in supervisor.memory():
        if holding.state == "placed":
            found.setdefault(holding.name, []).append(holding.generation)
    return found


def vary(directory: Path, seed: int) -> Path:
    """The model that ships, every value of every component a little off, in a new directory."""
    shutil.copytree(FIRST, directory, ignore=shutil.ignore_patterns("revision-2"))
    generator = torch.Generator().manual_seed(seed)
    for file in FILES.values():
        tensors = load_file(directory / file)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor.float() * (1 + 0.02 * noise)).to(tensor.dtype)
        save_file(tensors, directory / file)
    return directory
