"""The vae stage: init frames to latents, and latents to frames chunk by chunk.

From memory level 1 on, a clip is decoded, and encoded, in tiles (`stages/models/vae_tiles.py`), a part of the work in
each quantum: so a cancel, a shorter task or a change of the memory level waits for one tile, not for a clip. The quanta
before the last part are unfinished (`Parts`) and put nothing. A clip is finished in the way in which it began.
`stages/vae_clips.py` has the clips.

The VAE's weights are float32; `stages/models/vae_codec.py` says what computes with them. The image encoder runs in the
dtype of the DiT.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ipc.messages.job import Job
from ipc.messages.memory import OFFLOADED, MemoryPlan
from ipc.messages.names import KernelKind
from ipc.messages.reports import Parts, VaeChosen
from ipc.messages.stage import Run, Start
from ipc.messages.status import Copied
from ipc.tensors import dtype_of, put_tensor, slot_tensor
from stages.leaving import Leaving
from stages.media import read_image, upright
from stages.models import vae_check
from stages.models.blank import blank
from stages.models.image_encoder import ImageEncoder, image_tokens
from stages.models.vae import WanVae
from stages.models.vae_codec import Codec, make_codec
from stages.offload import Pools
from stages.stage import QUEUE_TIMEOUT, AnyNetwork, Left, Links, StageState
from stages.vae_clips import ChunkDecoding, Decoding, TileDecoding, TileEncoding, check_finite, encode_untiled
from stages.weights import Network, hold

log = logging.getLogger(__name__)

TILED = 1
"""Memory level from which clips are decoded in tiles."""


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
        self._encodings: dict[str, TileEncoding] = {}

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
    def step(self, run: Run) -> Parts | None:
        parts = self._encode(self._jobs[run.id]) if run.phase == "encode" else self._decode(run.id, run.index)
        self._rest()
        return parts

    def drop(self, identity: str) -> None:
        self._decodings.pop(identity, None)
        self._encodings.pop(identity, None)
        self._jobs.pop(identity, None)
        self._links.inputs["latents"].release(identity)
        self._rest()

    @torch.inference_mode()
    def rehearse(self) -> None:
        codec = make_codec(self._vae.use(self._vae.content), self._kind, self._device)
        latents = torch.zeros(1, codec.config.z_dim, 1, 4, 4, device=self._device)
        check_finite(codec.clip(4, 4).decode(latents), "a rehearsed chunk has", "the VAE")

    def set_memory(self, plan: MemoryPlan, left: Left) -> None:
        """What has begun goes on in tiles or untiled as it began, a clip that is untiled with the weights that its
        codec has."""
        self._codec = None
        networks = list(self._all.values())
        pools = [Pools(each.device, each.lane, 0) for each in networks] if plan.level >= OFFLOADED else None
        hold(networks, pools, self._links, left, outliving=self._outliving)
        self._plan = plan

    def _rest(self) -> None:
        """No clip has something on the device: if the weights come from the host, the device needs none of them."""
        if self._plan.level >= OFFLOADED and all(decoding.rests for decoding in self._decodings.values()):
            self._codec = None
            for network in self._all.values():
                network.release()

    def copied(self) -> Copied | None:
        return self._vae.lane.copied()

    def state(self) -> StageState:
        held = sum(clip.nbytes for clips in (self._decodings, self._encodings) for clip in clips.values())
        return StageState(frozenset(self._jobs), held)

    def _codec_of(self, job: Job) -> Codec:
        """The codec with the version of the weights that the task wants, to which the VAE is bound. One version's is
        kept; a decoding that has begun keeps its own."""
        vae = self._vae.of(job)
        if self._codec is None or self._codec[0] != self._vae.content:
            self._codec = self._vae.content, make_codec(vae, self._kind, self._device)
        return self._codec[1]

    def _encode(self, job: Job) -> Parts | None:
        """Put the latents of the init file as what the request wants it for; then the image tokens, if the DiT reads
        some. In tiles, one part, and all that only after the last."""
        assert job.init is not None, f"task {job.id} has nothing to encode"
        codec = self._codec_of(job)
        if job.id not in self._encodings and self._plan.level < TILED:
            self._put_encoded(job, encode_untiled(job, self._chunk, codec, self._device, self._links.beat))
            return None
        encoding = self._encodings.get(job.id)
        if encoding is None:
            encoding = self._encodings[job.id] = TileEncoding(job, self._chunk, self._links.beat, codec)
        latents = encoding.part(codec)
        if latents is None:
            return encoding.parts
        self._put_encoded(job, latents)
        del self._encodings[job.id]
        return Parts(encoding.parts.total, encoding.parts.total)

    def _put_encoded(self, job: Job, latents: Tensor) -> None:
        """Latents [1, z, T, h, w], and the image tokens."""
        assert job.init is not None
        queue, encoded = self._links.outputs["init_latents"], latents.squeeze(0).float()
        check_finite(encoded, "the encoded init file has", "the VAE")
        put_tensor(queue, job.id, 0, encoded, QUEUE_TIMEOUT)
        if self._image_encoder is not None and job.init_as == "channels":
            tokens = image_tokens(self._image_encoder.of(job), torch.from_numpy(upright(read_image(job.init))))
            check_finite(tokens, "the image tokens have", "the image encoder")
            put_tensor(queue, job.id, 1, tokens, QUEUE_TIMEOUT)

    def _decode(self, identity: str, index: int) -> Parts | None:
        """Have chunk `index` delivered; in tiles, do one part, and that only after the last. A clip of which nothing is
        there, as a chunk has failed, is begun as the level wants it now: one that lacked memory untiled may fit in
        tiles."""
        latents = slot_tensor(self._links.inputs["latents"].take(identity, 0, QUEUE_TIMEOUT))
        decoding = self._decodings.get(identity)
        if decoding is None or not decoding.begun:
            kind = TileDecoding if self._plan.level >= TILED else ChunkDecoding
            decoding = self._decodings[identity] = kind(self._chunk, self._links.beat, self._device)
        frames = decoding.chunk(lambda: self._codec_of(self._jobs[identity]), latents, index)
        if frames is not None:
            self._links.deliver(Leaving(self._links.outputs["frames"], identity, index, frames, QUEUE_TIMEOUT))
        return decoding.parts


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
