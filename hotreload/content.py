"""The content hash of a component: what was read, however the files are cut into shards and whoever named the tensors.

xxh3_128 (19 to 48 GB/s; it tells contents apart, and proves nothing against an attacker) of each `CHUNK` of a tensor's
bytes, of these together with our name, the dtype and the shape, and of all tensors in the order of their names, each
followed by what LoRA files add to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import xxhash

from hotreload.safetensors_file import TensorEntry

CHUNK = 8 << 20
"""Bytes that are read and hashed at once. A multiple of every dtype's size."""


def chunk_digest(data: memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def tensor_digest(entry: TensorEntry, chunks: Iterable[bytes]) -> bytes:
    """`chunks`: digests of the tensor's chunks, in order."""
    return xxhash.xxh3_128_digest(f"{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode() + b"".join(chunks))


def content_hash(tensors: Mapping[str, bytes], added: Mapping[str, bytes]) -> str:
    """Hex, 32 characters. `tensors`: digest of each by name; `added`: digest of what was merged into some of them."""
    return xxhash.xxh3_128_hexdigest(b"".join(tensors[name] + added.get(name, b"") for name in sorted(tensors)))
