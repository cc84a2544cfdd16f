"""What a clip takes while it is coded chunk by chunk: the same however long it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.models.vae import WanVae
from stages.models.vae_codec import Codec, FastCodec, PlainCodec
from stages.models.vae_walk import TorchOperations
from tests.stages.models.test_vae import SMALL, SMALL_22, Harden, make_model, make_reference

CHUNKS = (4, 16)
"""Of the two clips: latent frames after the first."""


class Allocated(TorchDispatchMode):
    """Bytes of all storages that were made within it: those that live, and the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.fixture(params=[SMALL, SMALL_22], ids=["2.1", "2.2"])
def vae(request: pytest.FixtureRequest, harden: Harden) -> WanVae:
    return make_model(request.param, harden(make_reference(request.param)).state_dict())


@pytest.fixture(params=["plain", "fast"])
def codec(request: pytest.FixtureRequest, vae: WanVae) -> Codec:
    return PlainCodec(vae) if request.param == "plain" else FastCodec(vae, TorchOperations(), torch.float32)


@torch.inference_mode()
def peak_of(code: Callable[[Tensor], Tensor], chunks: Iterable[Tensor]) -> int:
    """The most bytes at a time of a clip whose chunks go as they come."""
    with Allocated() as allocated:
        for chunk in chunks:
            code(chunk)
    assert allocated.peak > 0
    return allocated.peak


def test_a_longer_clip_decodes_in_the_same_memory(codec: Codec) -> None:
    """To the byte."""
    codec.clip(3, 5).decode(torch.zeros(1, codec.config.z_dim, 1, 3, 5))  # what is made once per codec
    chunk = torch.randn(1, codec.config.z_dim, 1, 3, 5)
    short, long = (peak_of(codec.clip(3, 5).decode, [chunk] * (1 + count)) for count in CHUNKS)
    assert short == long


def test_a_longer_clip_is_encoded_in_the_same_memory(codec: Codec) -> None:
    """To the byte."""
    height, width = (side * codec.config.spatial_stride for side in (3, 5))
    first = torch.rand(1, 3, 1, height, width)
    codec.clip(3, 5).encode(first)  # what is made once per codec
    chunk = torch.rand(1, 3, codec.config.temporal_stride, height, width)
    short, long = (peak_of(codec.clip(3, 5).encode, [first, *[chunk] * count]) for count in CHUNKS)
    assert short == long
