"""Time to switch between LoRA adapters against that of a denoising step, with random weights.

    python -m tools.bench_lora                                # Wan2.1-T2V-14B, 832x480, 81 frames, on a GPU of 80 GB
    python -m tools.bench_lora --model wan-demo --device cpu --width 96 --height 96 --frames 17

Two adapters with pairs for every linear of attention and feed-forward, A of `--rank` and B of half of it, lie in host
memory as the supervisor holds them. What is timed is all that a dit does before the first step of a request that wants
others than the one before: free the old tensors, bring the pairs to the device, make the new tensors, bind. A step is
two forwards, as with guidance. The device is waited for before and after each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from engine.models import load_model
from engine.params import ModelParams
from hotreload.adapters import place_adapter
from hotreload.placement import Shapes
from stages.adapters import Wanted
from stages.models.blank import blank
from stages.models.transformer import WanTransformer, keeps_float32
from stages.weights import Network, create, runs_of, shapes_of
from tools.random_weights import law

LINEARS = (
    *(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
"""Of each block, that an adapter has a pair for."""
LIMIT = 0.05
"""Of a step: what a switch may take."""


class Size(NamedTuple):
    """Of the video whose steps are timed."""

    width: int
    height: int
    frames: int


class Bench:
    """A transformer with random weights in memory that outlives a process, and adapters beside it."""

    def __init__(self, model: ModelParams, device: str, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        with blank():
            module = WanTransformer(model.transformer)
        shapes = shapes_of(module, lambda name: torch.float32 if keeps_float32(name) else dtype, {})
        self._shapes = {name: shape for name, (_, shape) in shapes.items()}
        self.network = Network(module, "transformer", shapes, {}, "", torch.device(device))
        self._place(shapes)

    def _place(self, shapes: Shapes) -> None:
        placement = create("transformer", self._device, shapes, runs_of(self.network.module))
        for name, tensor in placement.tensors.items():
            mean, std = law(name, tuple(tensor.shape))
            tensor.normal_(mean, std)
        version = placement.seal("transformer", "base")
        self.network.adopt(version, placement.fd)
        placement.close()
        self.network.use("base")

    def add(self, directory: Path, rank: int) -> Wanted:
        """An adapter of this rank, at strength 1."""
        tensors: dict[str, torch.Tensor] = {}
        for block in range(self._model.transformer.num_layers):
            for linear in LINEARS:
                key = f"blocks.{block}.{linear}"
                rows, columns = self._shapes[f"{key}.weight"]
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, dtype=self._dtype) / columns**0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, dtype=self._dtype) / rank**0.5
        file = directory / f"rank-{rank}.safetensors"
        save_file(tensors, file)
        adapter, placement = place_adapter(file, "transformer", self._shapes, file.name)
        self.network.lend(adapter.version, placement.fd)
        placement.close()
        print(f"adapter of rank {rank}: {adapter.version.bytes / 1e6:.0f} MB, {adapter.tensors} tensors")
        return ((adapter.version.content, 1.0),)

    def switch(self, loras: Wanted) -> float:
        """Seconds to bind this, from whatever is bound."""
        return self._timed(lambda: self.network.use("base", loras))

    def step(self, size: Size, count: int = 3) -> float:
        """Seconds of a step: the median of `count`, after one that is not counted."""
        model, vae, config = self.network.module, self._model.vae, self._model.transformer
        grid = (
            (size.frames - 1) // vae.temporal_stride + 1,
            size.height // vae.spatial_stride,
            size.width // vae.spatial_stride,
        )
        latents = torch.randn(1, config.in_channels, *grid, device=self._device)
        timestep = torch.tensor([500.0], device=self._device)
        prompt = model.encode_prompt(torch.randn(1, config.text_len, config.text_dim, device=self._device))
        rope = model.rope(*grid)

        def run() -> None:
            for _ in range(2):
                model(latents, timestep, prompt, rope)

        return statistics.median([self._timed(run) for _ in range(1 + count)][1:])

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)


@torch.inference_mode()
def measure(model: ModelParams, device: str, dtype: torch.dtype, size: Size, rank: int, rounds: int) -> float:
    """Print each switch, and return the share of a step that the slowest kind of them takes."""
    bench = Bench(model, device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        a, b = (bench.add(Path(directory), each) for each in (rank, rank // 2))
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, loras in (("none -> A", a), ("A -> B", b), ("B -> A", a), ("A -> none", ())):
            seconds.setdefault(name, []).append(bench.switch(loras))
    bench.switch(a)
    step = bench.step(size)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    print(
        f"{model.name}, {size.width}x{size.height}, {size.frames} frames, {dtype}, {where}, torch {torch.__version__}"
    )
    print(f"step: {1e3 * step:.0f} ms")
    for name, each in seconds.items():
        median = statistics.median(each)
        share = 100 * median / step
        print(f"{name:10} first {1e3 * each[0]:6.0f} ms, median {1e3 * median:6.0f} ms: {share:.1f} % of a step")
    return max(statistics.median(each) for each in seconds.values()) / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-t2v-14b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    dtype = torch.bfloat16 if asked.device.startswith("cuda") else torch.float32
    size = Size(asked.width, asked.height, asked.frames)
    share = measure(load_model(asked.model), asked.device, dtype, size, asked.rank, asked.rounds)
    print(f"the slowest takes {100 * share:.1f} % of a step; the limit is {100 * LIMIT:.0f} %")
    sys.exit(share > LIMIT)


if __name__ == "__main__":
    main()
