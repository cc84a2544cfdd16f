"""The text stage: a prompt becomes prompt embeddings."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ipc.errors import NumericalError
from ipc.messages.job import Job
from ipc.messages.memory import OFFLOADED, MemoryPlan
from ipc.messages.stage import Run, Start
from ipc.messages.status import Copied
from ipc.tensors import dtype_of, room_tensor
from stages.models.blank import blank
from stages.models.text_encoder import ALIASES, TextEncoder, build, encode
from stages.offload import Pools
from stages.prompt import check_vocabulary, load_tokenizer, prompt_ids
from stages.sampling import guided
from stages.stage import QUEUE_TIMEOUT, AnyNetwork, Left, Links, StageState
from stages.weights import Network, hold, version_of

KEPT_PROMPTS = 64
"""Prompts whose embeddings are kept; the negative prompt is mostly the same. Only real rows are kept: 8 KiB a token."""


class TextStage:
    """Puts `prompts`, [text_len, text_dim]: sequence 0 of the prompt, 1 of the negative prompt if guidance is on.

    Error handling: `BadRequest` for a prompt of too many tokens; `NumericalError` for values that are not finite.
    """

    def __init__(self, start: Start, links: Links, tokenizer: Tokenizer, encoder: Network[TextEncoder]) -> None:
        self._links = links
        self._outliving = start.outliving
        self._length = start.transformer.text_len
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._jobs: dict[str, Job] = {}
        self._kept: collections.OrderedDict[tuple[str, tuple[int, ...]], Tensor] = collections.OrderedDict()

    @classmethod
    def load(cls, start: Start, links: Links) -> TextStage:
        """Read the tokenizer, build and bind the encoder. Raises `BadCheckpoint`, for the tokenizer before the weights
        are read."""
        tokenizer = load_tokenizer(start.tokenizer)
        check_vocabulary(tokenizer, start.text_encoder.vocab_size)
        with blank():
            encoder = build(start.text_encoder)
        network = Network.load(
            encoder,
            start,
            links,
            "text_encoder",
            device=start.devices["text"],
            dtype=lambda key: dtype_of(start.dtype),
            aliases=ALIASES,
        )
        stage = cls(start, links, tokenizer, network)
        stage.set_memory(start.memory, [])
        return stage

    @property
    def weights(self) -> Mapping[str, str]:
        return {"text_encoder": self._encoder.content}

    @property
    def networks(self) -> Mapping[str, AnyNetwork]:
        return {"text_encoder": self._encoder}

    @property
    def versions(self) -> Mapping[str, str]:
        return {
            "torch": str(torch.__version__),
            "tokenizers": tokenizers.__version__,
        }

    def begin(self, job: Job) -> None:
        self._jobs[job.id] = job

    @torch.inference_mode()
    def step(self, run: Run) -> None:
        job = self._jobs[run.id]
        texts = [job.prompt]
        if guided(max(job.guidance_scale, job.guidance_scale_2)):
            texts.append(job.negative_prompt)
        ids = [tuple(prompt_ids(self._tokenizer, text, self._length)) for text in texts]
        for sequence, rows in enumerate(self._embed(job, ids)):
            self._put(job.id, sequence, rows)
            self._links.beat()

    def _put(self, identity: str, sequence: int, rows: Tensor) -> None:
        """Hand over [tokens, text_dim] with zero rows up to the full length, unless that was done."""
        queue, shape = self._links.outputs["prompts"], (self._length, rows.shape[1])
        if not queue.holds(identity, sequence):
            with room_tensor(queue, identity, sequence, rows.dtype, shape, QUEUE_TIMEOUT) as room:
                room[: len(rows)] = rows
                room[len(rows) :] = 0

    def drop(self, identity: str) -> None:
        self._jobs.pop(identity, None)

    def rehearse(self) -> None:
        ids = tuple(prompt_ids(self._tokenizer, "a video", self._length))
        with torch.inference_mode():
            self._encoded(self._encoder.use(self._encoder.content), [ids])

    def set_memory(self, plan: MemoryPlan, left: Left) -> None:
        encoder = self._encoder
        pools = [Pools(encoder.device, encoder.lane, 0)] if plan.level >= OFFLOADED else None
        hold([encoder], pools, self._links, left, outliving=self._outliving)

    def copied(self) -> Copied | None:
        return self._encoder.lane.copied()

    def state(self) -> StageState:
        return StageState(frozenset(self._jobs), sum(rows.nbytes for rows in self._kept.values()))

    def _embed(self, job: Job, texts: list[tuple[int, ...]]) -> list[Tensor]:
        """[tokens, text_dim] of each, on the CPU; kept by version and content, the least recently used is forgotten."""
        content = version_of(job, "text_encoder", 0) or self._encoder.content
        known = {ids: rows for ids in texts if (rows := self._kept.pop((content, ids), None)) is not None}
        if missing := [ids for ids in dict.fromkeys(texts) if ids not in known]:
            known |= zip(missing, self._encoded(self._encoder.of(job), missing), strict=True)
            self._encoder.release()
        for ids in texts:
            self._kept[content, ids] = known[ids]
        while len(self._kept) > KEPT_PROMPTS:
            self._kept.popitem(last=False)
        return [known[ids] for ids in texts]

    def _encoded(self, encoder: TextEncoder, texts: list[tuple[int, ...]]) -> list[Tensor]:
        every = [rows.cpu() for rows in encode(encoder, *texts)]
        if not all(bool(torch.isfinite(rows).all()) for rows in every):
            raise NumericalError("the text encoder gave values that are not finite; check its weights")
        return every
