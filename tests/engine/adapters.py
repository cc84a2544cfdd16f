"""Small random LoRA files for the model that ships, and what videos are with them merged at load."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine import Supervisor, SystemParams, UserParams
from tests.conftest import Video

DIM, FFN, BLOCKS = 192, 384, 6
"""Of wan-demo's transformer."""
SHAPES = {"self_attn.q": (DIM, DIM), "cross_attn.o": (DIM, DIM), "ffn.0": (FFN, DIM)}


def write_adapter(path: Path, seed: int, rank: int, blocks: Iterable[int] = range(BLOCKS), size: float = 0.3) -> Path:
    """Pairs for some linears of some blocks, and a difference of a bias; `size` is about that of what is added, of
    which the weights are a tenth."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for block in blocks:
        for module, (rows, columns) in SHAPES.items():
            key = f"diffusion_model.blocks.{block}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * size / rank**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
        tensors[f"diffusion_model.blocks.{block}.self_attn.v.diff_b"] = torch.randn(DIM, generator=generator) * size
    save_file(tensors, path)
    return path


def ask(path: Path, *loras: str, **fields: Any) -> UserParams:
    """The smallest video that shows a difference."""
    small = {"steps": 2, "num_frames": 1, "height": 32, "width": 32, "guidance_scale": 1.0, "seed": 3}
    return UserParams(**{"prompt": "a red circle moves left", "output": str(path), "lora": loras, **small, **fields})


FILES = {"a": (1, 4), "b": (2, 1), "c": (3, 2)}
"""Adapter -> seed and rank of its file."""
COMBINATIONS: tuple[tuple[str, ...], ...] = ((), ("a:1",), ("b:1",), ("a:0.5", "b:-1"), ("c:-0.5",))


def write_files(directory: Path) -> dict[str, Path]:
    """Those of `FILES`."""
    return {name: write_adapter(directory / f"{name}.safetensors", *FILES[name]) for name in FILES}


async def fresh_start(directory: Path, combination: tuple[str, ...]) -> str:
    """SHA-256 of the frames that an engine makes which was started with these adapters merged."""
    files = write_files(directory)
    options = tuple(f"{files[text[0]]}{text[1:]}" for text in combination)
    system = SystemParams(placement="fused", device="cpu", lora=options)
    async with Supervisor(system) as supervisor:
        return Video((await supervisor.generate(ask(directory / "fresh.mp4"))).path).sha256
