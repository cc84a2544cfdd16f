"""Weights in GPU memory: the checksum, which is the same on every device, and, on a GPU, binding to what was placed."""

from __future__ import annotations

import msgspec
import pytest
import torch

from hotreload.device_placement import WORDS, DevicePlacement, checksum
from hotreload.placement import Slots
from tests.hotreload.test_placement import SHAPES, contents, on_meta


def data(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [1, 8, 64, 4093, 8 * WORDS + 64])
def test_the_checksum_sees_every_bit(size: int) -> None:
    """A flipped bit anywhere, first and last included, two words or two blocks that change places, or a longer tail of
    zeros where bytes were: another sum. The same bytes: the same."""
    original = data(size)
    total = checksum(original)
    assert checksum(original.clone()) == total
    for place in {0, size // 2, size - 1}:
        for bit in (0, 7):
            damaged = original.clone()
            damaged[place] ^= 1 << bit
            assert checksum(damaged) != total
    if size >= 64:
        swapped = original.clone()
        swapped[:8], swapped[8:16] = original[8:16], original[:8]
        assert checksum(swapped) != total
    if size > 8 * WORDS:
        moved = original.clone()
        moved[: 8 * (size - 8 * WORDS) // 8] = original[8 * WORDS :]
        moved[8 * WORDS :] = original[: size - 8 * WORDS]
        assert checksum(moved) != total


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 4093, 8 * WORDS + 64])
def test_the_checksum_is_that_of_the_cpu(size: int) -> None:
    assert checksum(data(size).cuda()) == checksum(data(size))


@pytest.mark.gpu
def test_a_module_bound_to_gpu_memory_holds_its_bytes() -> None:
    """Parameters and buffers are views of the memory; a changed bit and another size are refused."""
    placement = DevicePlacement.create(0, SHAPES)
    for name, tensor in contents().items():
        placement.tensors[name].copy_(tensor)
    version = placement.seal("vae", "abc")
    attached = DevicePlacement.attach(version, placement.fd, SHAPES)
    module = on_meta()
    Slots(module, {}).bind(attached.tensors)
    attached.close()
    assert all(torch.equal(module.state_dict()[name].cpu(), tensor) for name, tensor in contents().items())
    with pytest.raises(ValueError, match="expected"):
        DevicePlacement.attach(msgspec.structs.replace(version, bytes=1), placement.fd, SHAPES)
    placement.tensors["scale"].view(torch.uint8)[5] ^= 1
    with pytest.raises(ValueError, match="its bytes sum to"):
        DevicePlacement.attach(version, placement.fd, SHAPES)
