"""The vae stage: init frames to latents, and latents to frames chunk by chunk.

The VAE runs in float32 on every device, as the original does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hotreload.weights import load_weights
from ipc.errors import NumericalError
from ipc.messages import Job, Run, Start
from ipc.tensors import put_tensor, slot_tensor
from stages.media import read_frames
from stages.models.vae import Cache, WanVae
from stages.stage import QUEUE_TIMEOUT, Links, StageState, component


@dataclass(slots=True)
class Decoding:
    """A task whose latents are being decoded: what the causal convolutions remember, and the next chunk."""

    cache: Cache = field(default_factory=dict)
    next: int = 0


class VaeStage:
    """`encode`: reads the init file, puts `init_latents`. `decode`: takes `latents`, puts `frames`.

    Error handling: `BadRequest` for an init file that cannot be used; `NumericalError` for values that are not finite.
    """

    def __init__(self, start: Start, links: Links, vae: WanVae, weights: str) -> None:
        self._links = links
        self._device = start.devices["vae"]
        self._chunk = start.decode_latents
        self._vae = vae
        self._weights = {"vae": weights}
        self._jobs: dict[str, Job] = {}
        self._decodings: dict[str, Decoding] = {}

    @classmethod
    def load(cls, start: Start, links: Links) -> VaeStage:
        """Build and bind the VAE. Raises `BadCheckpoint`."""
        with torch.device("meta"):
            vae = WanVae(start.vae)
        weights = load_weights(
            vae,
            Path(component(start, "vae").directory),
            "vae",
            device=start.devices["vae"],
            dtype=lambda key: torch.float32,
            beat=links.beat,
        )
        return cls(start, links, vae, weights)

    @property
    def weights(self) -> Mapping[str, str]:
        return self._weights

    @property
    def versions(self) -> Mapping[str, str]:
        return {"torch": str(torch.__version__)}

    def begin(self, job: Job) -> None:
        self._jobs[job.id] = job

    @torch.inference_mode()
    def step(self, run: Run) -> None:
        if run.phase == "encode":
            self._encode(self._jobs[run.id])
        else:
            self._decode(run.id, run.index)

    def drop(self, identity: str) -> None:
        self._decodings.pop(identity, None)
        self._jobs.pop(identity, None)
        self._links.inputs["latents"].release(identity)

    def state(self) -> StageState:
        held = sum(t.nbytes for decoding in self._decodings.values() for t in decoding.cache.values())
        return StageState(frozenset(self._jobs), held)

    def _encode(self, job: Job) -> None:
        assert job.init is not None, f"task {job.id} has nothing to encode"
        frames = torch.from_numpy(read_frames(job.init, job.num_frames, job.height, job.width))
        latents = []
        cache: Cache = {}
        for chunk in split_frames(frames, self._chunk * self._vae.config.temporal_stride):
            latents.append(self._vae.encode_chunk(to_pixels(chunk.to(self._device)), cache))
            self._links.beat()
        encoded = torch.cat(latents, dim=2).squeeze(0).float()
        check_finite(encoded, "the encoded init video has")
        put_tensor(self._links.outputs["init_latents"], job.id, 0, encoded, QUEUE_TIMEOUT)

    def _decode(self, identity: str, index: int) -> None:
        """Put chunk `index`. Chunks before it are decoded again, silently, if this process has not."""
        decoding = self._decodings.get(identity)
        if decoding is None or decoding.next > index:
            decoding = self._decodings[identity] = Decoding()
        latents = slot_tensor(self._links.inputs["latents"].take(identity, 0, QUEUE_TIMEOUT))
        while decoding.next <= index:
            chunk = latents[:, decoding.next * self._chunk : (decoding.next + 1) * self._chunk]
            pixels = self._vae.decode_chunk(chunk.unsqueeze(0).to(self._device), decoding.cache)
            decoding.next += 1
            self._links.beat()
        check_finite(pixels, f"chunk {index} of the decoded video has")
        put_tensor(self._links.outputs["frames"], identity, index, to_frames(pixels), QUEUE_TIMEOUT)


def split_frames(frames: Tensor, size: int) -> Iterator[Tensor]:
    """[1 + 4n, ...] -> the first frame, then `size` (a multiple of 4) at a time: what `encode_chunk` wants."""
    yield frames[:1]
    yield from frames[1:].split(size) if len(frames) > 1 else ()


def to_pixels(frames: Tensor) -> Tensor:
    """[T, H, W, 3] uint8 -> [1, 3, T, H, W] float32 in [-1, 1]."""
    return (frames.permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5) - 1


def to_frames(pixels: Tensor) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1] -> [T, H, W, 3] uint8, rounded to the nearest."""
    return pixels.squeeze(0).permute(1, 2, 3, 0).float().add(1).mul(127.5).round().to(torch.uint8)


def check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{what} values that are not finite; check the weights of the VAE")
