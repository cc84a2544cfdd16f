"""What a clip takes of host memory while the vae codes it, by its number of frames: whole frames and tiles, both ways.

    python -m tools.bench_clips > docs/results/clips-cpu.txt

wan-demo's VAE with random weights at 192x192, on a CPU. Each line is a process of its own. "between quanta" is what the
vae has of the clip then, by its own account, at most; "resident" by how much the process grew, by the kernel's. Then,
for the models, what `engine/footprint.py` reckons with for a clip in tiles, in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import av
import numpy as np
import torch

from engine.footprint import RequestSize, clip_bytes
from engine.memory import DECODE_LATENTS
from engine.models import list_models, load_model
from engine.params import ModelParams
from ipc.messages.job import Job
from stages.models.vae_check import random_vae
from stages.models.vae_codec import Codec, PlainCodec
from stages.vae_clips import ChunkDecoding, Decoding, TileDecoding, TileEncoding, encode_untiled
from tools.machine import host_line

SIDE = 192
FRAMES = (17, 81, 321)
CPU = torch.device("cpu")

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""So that what is freed is not resident any more: else the C library keeps some tens of MB, now more, now less."""

Way = Literal["encode untiled", "encode in tiles", "decode untiled", "decode in tiles"]


def video(path: Path, frames: int) -> None:
    """Noise, which is the same every time."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for _ in range(frames):
            picture = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def job_of(init: str | None, frames: int) -> Job:
    return Job(
        id=uuid.uuid4().hex, prompt="", negative_prompt="", height=SIDE, width=SIDE, num_frames=frames, fps=8, steps=1,
        guidance_scale=1.0, guidance_scale_2=1.0, seed=0, solver="unipc", flow_shift=3.0, init=init, start_step=0,
        output="", metadata_json=False, metadata={},
    )  # fmt: skip


def peak() -> int:
    """Bytes of this process that were resident at once, at most, since `forget_peak`."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def encode(codec: Codec, job: Job, *, tiled: bool) -> int:
    """Bytes between quanta, at most."""
    if not tiled:
        encode_untiled(job, DECODE_LATENTS, codec, CPU, lambda: None)
        return 0
    clip, most = TileEncoding(job, DECODE_LATENTS, lambda: None, codec), 0
    while clip.part(codec) is None:
        most = max(most, clip.nbytes)
    return most


def decode(codec: Codec, frames: int, *, tiled: bool) -> int:
    """As `encode`."""
    stride, scale = codec.config.temporal_stride, codec.config.spatial_stride
    latents = torch.zeros(codec.config.z_dim, (frames - 1) // stride + 1, SIDE // scale, SIDE // scale)
    kind: Callable[..., Decoding] = TileDecoding if tiled else ChunkDecoding
    clip, most = kind(DECODE_LATENTS, lambda: None, CPU), 0
    for index in range(-(-latents.shape[1] // DECODE_LATENTS)):
        while clip.chunk(lambda: codec, latents, index) is None:
            most = max(most, clip.nbytes)
        most = max(most, clip.nbytes)
    return most


@torch.inference_mode()
def measure(way: Way, frames: int) -> None:
    """One line. What a first clip of five frames takes for ever is not counted."""
    codec, tiled = PlainCodec(random_vae(load_model("wan-demo").vae, CPU)), "tiles" in way
    with tempfile.TemporaryDirectory() as directory:
        before = 0
        for count in (5, frames):
            init = Path(directory) / f"{count}.mp4"
            video(init, count)
            forget_peak()
            before = peak()
            encodes = way.startswith("encode")
            kept = (
                encode(codec, job_of(str(init), count), tiled=tiled) if encodes else decode(codec, count, tiled=tiled)
            )
    grew = (peak() - before) / 2**20
    print(f"{way:16} {frames:4} frames: {kept / 2**20:6.1f} MiB between quanta, {grew:6.1f} MiB resident", flush=True)


def reckon(model: ModelParams) -> None:
    """One line: its usual request, started from a video, and the largest that it takes."""
    usual, limits = model.defaults, model.limits
    largest = RequestSize(limits.max_pixels // usual.height, usual.height, limits.max_frames, image=True)
    for size in (RequestSize(usual.width, usual.height, usual.num_frames, image=True), largest):
        taken = clip_bytes(model, size, "bfloat16") / 2**20
        print(f"{model.name:20} {size.width}x{size.height}x{size.frames}: {taken:7.1f} MiB of host memory in tiles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("WAY", "FRAMES"), help="one line, in this process")
    arguments = parser.parse_args()
    if arguments.only is not None:
        measure(arguments.only[0], int(arguments.only[1]))
        return
    print("$ python -m tools.bench_clips", flush=True)
    print(f"{host_line()}, torch {torch.__version__}; {SIDE}x{SIDE}, wan-demo's VAE", flush=True)
    for way in get_args(Way):
        for frames in FRAMES:
            command = [sys.executable, "-m", "tools.bench_clips", "--only", way, str(frames)]
            subprocess.run(command, check=True, env=os.environ | GIVING_BACK)
    for name in list_models():
        reckon(load_model(name))


if __name__ == "__main__":
    main()
