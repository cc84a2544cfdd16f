"""The vae stage: init frames to latents, and latents to frames chunk by chunk.

From memory level 1 on, all frames of a clip are decoded in its first chunk's quantum, tile by tile, and wait in host
memory (`stages/models/vae_tiles.py`). A clip is finished in the way in which it began.

The VAE's weights are float32; `stages/models/vae_codec.py` says what computes with them. The image encoder runs in the
dtype of the DiT.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ipc.errors import NumericalError
from ipc.messages import OFFLOADED, Copied, Job, KernelKind, MemoryPlan, Run, Start, VaeChosen
from ipc.tensors import dtype_of, put_tensor, slot_tensor
from stages.media import fit, read_frames, read_image, upright
from stages.models import vae_check
from stages.models.blank import blank
from stages.models.image_encoder import ImageEncoder, image_tokens
from stages.models.vae import WanVae
from stages.models.vae_codec import ClipCoder, Codec, make_codec
from stages.offload import Pools
from stages.stage import QUEUE_TIMEOUT, AnyNetwork, Left, Links, StageState
from stages.weights import Network, hold

log = logging.getLogger(__name__)

TILED = 1
"""Memory level from which clips are decoded in tiles."""


class Decoding(Protocol):
    """A task whose latents are being decoded."""

    def chunk(self, codec: Callable[[], Codec], latents: Tensor, index: int) -> Tensor:
        """The frames [t, H, W, 3] uint8 of chunk `index` of the clip with these latents [z, T, h, w]. codec: brings the
        VAE to the device, if it is not there. Raises `NumericalError`."""

    @property
    def done(self) -> bool:
        """Whether no more needs to be computed, so that the VAE may leave the device."""

    @property
    def nbytes(self) -> int:
        """Of the memory between chunks."""


@dataclass(slots=True)
class ChunkDecoding:
    """Chunk after chunk: what the causal convolutions remember, and the next one. Chunks before the one that is wanted
    are decoded again, silently, if this process has not."""

    size: int
    """Latent frames of a chunk."""
    links: Links
    device: torch.device
    clip: ClipCoder | None = None
    next: int = 0

    def chunk(self, codec: Callable[[], Codec], latents: Tensor, index: int) -> Tensor:
        coder = codec()
        if self.clip is None or self.next > index:
            self.clip, self.next = coder.clip(*latents.shape[2:]), 0
        while self.next <= index:
            chunk = latents[:, self.next * self.size : (self.next + 1) * self.size]
            pixels = self.clip.decode(chunk.unsqueeze(0).to(self.device))
            self.next += 1
            self.links.beat()
        check_finite(pixels, f"chunk {index} of the decoded video has", "the VAE")
        return to_frames(pixels)

    @property
    def done(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return 0 if self.clip is None else self.clip.nbytes


@dataclass(slots=True)
class TileDecoding:
    """All at once, in tiles, with the first chunk that is wanted."""

    size: int
    """Latent frames of a chunk."""
    links: Links
    device: torch.device
    frames: Tensor | None = None
    """All of the clip's, [F, H, W, 3] uint8, in host memory."""
    stride: int = 0
    """Frames per latent frame after the first."""

    def chunk(self, codec: Callable[[], Codec], latents: Tensor, index: int) -> Tensor:
        if self.frames is None:
            coder = codec()
            self.frames, self.stride = self._decode(coder, latents), coder.config.temporal_stride
        first, stop = (max(0, (i * self.size - 1) * self.stride + 1) for i in (index, index + 1))
        return self.frames[first:stop]

    @property
    def done(self) -> bool:
        return self.frames is not None

    def _decode(self, codec: Codec, latents: Tensor) -> Tensor:
        stride, scale = codec.config.temporal_stride, codec.config.spatial_stride
        count, height, width = latents.shape[1:]
        frames = torch.empty((count - 1) * stride + 1, height * scale, width * scale, 3, dtype=torch.uint8)
        pieces = codec.decode_tiles(latents.unsqueeze(0).to(self.device), self.size, beat=self.links.beat)
        for piece in pieces:
            check_finite(piece.pixels, "the decoded video has", "the VAE")
            part = to_frames(piece.pixels)
            t, h, w = (slice(at, at + n) for at, n in zip(piece[:3], part.shape[:3], strict=True))
            frames[t, h, w] = part.cpu()
            self.links.beat()
        return frames

    @property
    def nbytes(self) -> int:
        return 0 if self.frames is None else self.frames.nbytes


class VaeStage:
    """`encode`: reads the init file, puts `init_latents`. `decode`: takes `latents`, puts `frames`.

    Error handling: `BadRequest` for an init file that cannot be used; `NumericalError` for values that are not finite.
    """

    def __init__(
        self,
        start: Start,
        links: Links,
        kind: KernelKind,
        vae: Network[WanVae],
        image_encoder: Network[ImageEncoder] | None,
    ) -> None:
        self._links = links
        self._outliving = start.outliving
        self._plan = MemoryPlan()
        self._device = torch.device(start.devices["vae"])
        self._kind = kind
        self._chunk = start.decode_latents
        self._vae = vae
        self._codec: tuple[str, Codec] | None = None
        self._image_encoder = image_encoder
        self._jobs: dict[str, Job] = {}
        self._decodings: dict[str, Decoding] = {}

    @classmethod
    def load(cls, start: Start, links: Links) -> VaeStage:
        """Choose what to compute with, then build and bind the VAE, and the image encoder of a model that has one.
        Raises `BadCheckpoint`."""
        kind = choose_kernels(start, links)
        links.choose(VaeChosen(kernels=kind))
        device, dtype = start.devices["vae"], dtype_of(start.dtype)
        with blank():
            vae = WanVae(start.vae)
            image_encoder = ImageEncoder(start.image_encoder) if start.image_encoder is not None else None
        network = Network.load(vae, start, links, "vae", device=device, dtype=lambda key: torch.float32)
        images = None
        if image_encoder is not None:
            images = Network.load(image_encoder, start, links, "image_encoder", device=device, dtype=lambda key: dtype)
        stage = cls(start, links, kind, network, images)
        stage.set_memory(start.memory, [])
        return stage

    @property
    def weights(self) -> Mapping[str, str]:
        return {name: network.content for name, network in self._all.items()}

    @property
    def networks(self) -> Mapping[str, AnyNetwork]:
        return self._all

    @property
    def _all(self) -> dict[str, Network[Any]]:
        images = {} if self._image_encoder is None else {"image_encoder": self._image_encoder}
        return {"vae": self._vae, **images}

    @property
    def versions(self) -> Mapping[str, str]:
        return {"torch": str(torch.__version__), "vae": make_codec(self._vae.module, self._kind, self._device).name}

    def begin(self, job: Job) -> None:
        self._jobs[job.id] = job

    @torch.inference_mode()
    def step(self, run: Run) -> None:
        if run.phase == "encode":
            self._encode(self._jobs[run.id])
        else:
            self._decode(run.id, run.index)
        self._rest()

    def drop(self, identity: str) -> None:
        self._decodings.pop(identity, None)
        self._jobs.pop(identity, None)
        self._links.inputs["latents"].release(identity)
        self._rest()

    @torch.inference_mode()
    def rehearse(self) -> None:
        codec = make_codec(self._vae.use(self._vae.content), self._kind, self._device)
        latents = torch.zeros(1, codec.config.z_dim, 1, 4, 4, device=self._device)
        check_finite(codec.clip(4, 4).decode(latents), "a rehearsed chunk has", "the VAE")

    def set_memory(self, plan: MemoryPlan, left: Left) -> None:
        """A decoding that has begun goes on with the weights that its codec has, in tiles or untiled as it began."""
        self._codec = None
        networks = list(self._all.values())
        pools = [Pools(each.device, each.lane, 0) for each in networks] if plan.level >= OFFLOADED else None
        hold(networks, pools, self._links, left, outliving=self._outliving)
        self._plan = plan

    def _rest(self) -> None:
        """Nothing is being decoded or encoded: if the weights come from the host, the device needs none of them."""
        if self._plan.level >= OFFLOADED and all(decoding.done for decoding in self._decodings.values()):
            self._codec = None
            for network in self._all.values():
                network.release()

    def copied(self) -> Copied | None:
        return self._vae.lane.copied()

    def state(self) -> StageState:
        held = sum(decoding.nbytes for decoding in self._decodings.values())
        return StageState(frozenset(self._jobs), held)

    def _codec_of(self, job: Job) -> Codec:
        """The codec with the version of the weights that the task wants, to which the VAE is bound. One version's is
        kept; a decoding that has begun keeps its own."""
        vae = self._vae.of(job)
        if self._codec is None or self._codec[0] != self._vae.content:
            self._codec = self._vae.content, make_codec(vae, self._kind, self._device)
        return self._codec[1]

    def _encode(self, job: Job) -> None:
        """Put the latents of the init file as what the request wants it for; then the image tokens, if the DiT reads
        some."""
        assert job.init is not None, f"task {job.id} has nothing to encode"
        queue = self._links.outputs["init_latents"]
        codec = self._codec_of(job)
        size = job.height // codec.config.spatial_stride, job.width // codec.config.spatial_stride
        chunks = InitChunks(job, self._chunk * codec.config.temporal_stride)
        if self._plan.level >= TILED:
            latents = [codec.encode_tiles(chunks, *size, beat=self._links.beat)]
        else:
            clip, latents = codec.clip(*size), []
            for chunk in chunks:
                latents.append(clip.encode(chunk.to(self._device)))
                self._links.beat()
        encoded = torch.cat(latents, dim=2).squeeze(0).float()
        check_finite(encoded, "the encoded init file has", "the VAE")
        put_tensor(queue, job.id, 0, encoded, QUEUE_TIMEOUT)
        if self._image_encoder is not None and job.init_as == "channels":
            tokens = image_tokens(self._image_encoder.of(job), torch.from_numpy(upright(read_image(job.init))))
            check_finite(tokens, "the image tokens have", "the image encoder")
            put_tensor(queue, job.id, 1, tokens, QUEUE_TIMEOUT)

    def _decode(self, identity: str, index: int) -> None:
        """Put chunk `index`."""
        latents = slot_tensor(self._links.inputs["latents"].take(identity, 0, QUEUE_TIMEOUT))
        decoding = self._decodings.get(identity)
        if decoding is None:
            kind = TileDecoding if self._plan.level >= TILED else ChunkDecoding
            decoding = self._decodings[identity] = kind(self._chunk, self._links, self._device)
        try:
            frames = decoding.chunk(lambda: self._codec_of(self._jobs[identity]), latents, index)
        except BaseException:
            del self._decodings[identity]  # what it keeps of the frames before may be of two times by now
            raise
        put_tensor(self._links.outputs["frames"], identity, index, frames, QUEUE_TIMEOUT)


def choose_kernels(start: Start, links: Links) -> KernelKind:
    """What `start` says, or, where it leaves that to this vae, the kernels if they are right here."""
    device = torch.device(start.devices["vae"])
    if device.type == "cuda":
        torch.cuda.set_device(
            torch.device(device).index or 0
        )  # Triton launches on the current device, whatever its tensors'
    kind, problem = vae_check.choose(start.vae_kernels, start.vae, device, links.beat)
    if problem and device.type == "cuda":
        log.warning("the VAE's Triton kernels are not used, it computes in float32: %s", problem)
    return kind


class InitChunks(Iterable[Tensor]):
    """The clip that `job.init` stands for, [1, 3, frames, H, W] float32 at a time: the first frame, then `size` (a
    multiple of 4) frames each, which is what `encode_chunk` wants. It can be gone through again; the file is read once.

    start: the video, or the image held still. channels: the image, then mid-grey. first_frame: the image alone. All are
    scaled to cover the size and cropped in the centre. (The original does the same for first_frame; for channels it
    squeezes the picture into a size of about its own aspect, so that the crop here is of some pixels at most.)
    """

    def __init__(self, job: Job, size: int) -> None:
        assert job.init is not None
        self._job, self._size = job, size
        if job.init_as == "start":
            frames = read_frames(job.init, job.num_frames, job.height, job.width)
        else:
            frames = fit(read_image(job.init), job.height, job.width)[None]
        self._frames = frames

    def __iter__(self) -> Iterator[Tensor]:
        job, count = self._job, 1 if self._job.init_as == "first_frame" else self._job.num_frames
        yield self._pixels(slice(1))
        for first in range(1, count, self._size):
            if job.init_as == "start":
                yield self._pixels(slice(first, first + self._size))
            else:
                yield torch.zeros(()).expand(1, 3, min(self._size, count - first), job.height, job.width)

    def _pixels(self, frames: slice) -> Tensor:
        return to_pixels(torch.from_numpy(self._frames[frames].copy()))


def to_pixels(frames: Tensor) -> Tensor:
    """[T, H, W, 3] uint8 -> [1, 3, T, H, W] float32 in [-1, 1]."""
    return (frames.permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5) - 1


def to_frames(pixels: Tensor) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1] -> [T, H, W, 3] uint8, rounded to the nearest."""
    return pixels.squeeze(0).permute(1, 2, 3, 0).float().add(1).mul(127.5).round().to(torch.uint8)


def check_finite(values: Tensor, what: str, network: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{what} values that are not finite; check the weights of {network}")
