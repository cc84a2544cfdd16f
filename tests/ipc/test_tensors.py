from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ipc.state import StateSlots
from ipc.tensor_queue import TensorQueue
from ipc.tensors import commit_tensors, dtype_name, dtype_of, load_tensors, put_tensor, slot_tensor
from tests.ipc.peer import WAIT

A = "a" * 32
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64])
def test_every_dtype_passes_bit_for_bit(dtype: torch.dtype) -> None:
    """A tensor of random bits comes out with the same dtype, shape and bits, without a copy on the consumer's side."""
    size = torch.tensor([], dtype=dtype).element_size()
    bits = torch.randint(0, 256, (3, 4, 5 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = bits.view(dtype)
    with (
        TensorQueue.create("t", 1, 1000) as made,
        TensorQueue.attach(made.spec, made.fds, "producer", 1) as producer,
        TensorQueue.attach(made.spec, made.fds, "consumer", 1) as consumer,
    ):
        put_tensor(producer, A, 0, tensor, WAIT)
        slot = consumer.take(A, 0, WAIT)
        taken = slot_tensor(slot)
        assert (taken.dtype, taken.shape) == (dtype, tensor.shape)
        assert torch.equal(taken.view(torch.uint8), bits)
        slot.view[0] ^= 255
        assert taken.view(torch.uint8)[0, 0, 0] == bits[0, 0, 0] ^ 255


def test_strides_scalars_and_gradients_do_not_matter() -> None:
    """A transposed tensor, a scalar and one that requires a gradient arrive as plain tensors of the same values."""
    tensors = [torch.arange(12.0).reshape(3, 4).T, torch.tensor(7), torch.ones(2, requires_grad=True)]
    with (
        TensorQueue.create("t", 3, 1000) as made,
        TensorQueue.attach(made.spec, made.fds, "producer", 1) as producer,
        TensorQueue.attach(made.spec, made.fds, "consumer", 1) as consumer,
    ):
        for sequence, tensor in enumerate(tensors):
            put_tensor(producer, A, sequence, tensor, WAIT)
            taken = slot_tensor(consumer.take(A, sequence, WAIT))
            assert torch.equal(taken, tensor)
            assert taken.is_contiguous()
            assert not taken.requires_grad


def test_putting_again_does_nothing() -> None:
    """A quantum that is run again after a crash puts its result again: the first one stays, no second slot is used."""
    with (
        TensorQueue.create("t", 2, 1000) as made,
        TensorQueue.attach(made.spec, made.fds, "producer", 1) as producer,
    ):
        put_tensor(producer, A, 0, torch.ones(3), WAIT)
        put_tensor(producer, A, 0, torch.ones(3), WAIT)
        assert (made.statistics().depth, made.statistics().puts) == (1, 1)


def test_a_tensor_outlives_queue_and_release() -> None:
    """Everything is closed while a tensor over a slot is in use: reading it is safe."""
    with (
        TensorQueue.create("t", 1, 1000) as made,
        TensorQueue.attach(made.spec, made.fds, "producer", 1) as producer,
        TensorQueue.attach(made.spec, made.fds, "consumer", 1) as consumer,
    ):
        put_tensor(producer, A, 0, torch.full((10,), 3.0), WAIT)
        taken = slot_tensor(consumer.take(A, 0, WAIT))
    assert taken.sum() == 30
    del taken


def test_a_dtype_that_does_not_cross_is_refused() -> None:
    with pytest.raises(ValueError, match="got dtype complex64, expected one of"):
        dtype_name(torch.complex64)
    with pytest.raises(ValueError, match="got dtype 'tensor', expected one of"):
        dtype_of("tensor")


def test_state_tensors_are_committed_and_loaded() -> None:
    """A state of tensors of several dtypes and strides is loaded bit for bit, as copies that no commit touches."""
    state = {
        "latents": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "history": torch.randn(3, 2).bfloat16().T,
        "order": torch.tensor(2),
    }
    with StateSlots.create(1, 1000) as made, StateSlots.attach(made.spec, made.fds, 1) as states:
        slot = states.claim(A)
        assert load_tensors(slot) is None
        commit_tensors(slot, 4, state)
        loaded = load_tensors(slot)
        assert loaded is not None
        for _ in range(2):
            commit_tensors(slot, 5, {"latents": torch.zeros(2, 3)})
        step, tensors = loaded
        assert step == 4
        assert list(tensors) == list(state)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
        assert all(tensors[name].dtype == tensor.dtype for name, tensor in state.items())


def test_only_this_module_imports_torch() -> None:
    """Importing every other module of `ipc` leaves torch out of the process."""
    modules = [path.stem for path in (ROOT / "ipc").glob("*.py") if path.stem not in ("__init__", "tensors")]
    code = (
        f"import sys, importlib\nfor m in {modules}: importlib.import_module('ipc.' + m)\nprint('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr
