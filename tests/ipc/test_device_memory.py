"""GPU memory that outlives its makers. What needs a GPU is marked; the rest says what happens where there is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.device_memory import ask, make_device_memory
from engine.memory import EngineMemory, device_sizes
from engine.models import load_model
from ipc.channel import Channel
from ipc.device_maker import PATTERN
from ipc.device_memory import DeviceMemory, DeviceMemoryError, DeviceView
from ipc.messages.memory import MakeMemory, MemoryReply, ProbeMemory
from ipc.payload import DeviceFd, HeldPayload, payload_bytes
from ipc.state import StateSlots, state_payload_bytes
from ipc.tensor_queue import TensorQueue
from ipc.tensors import commit_tensors, load_tensors, put_tensor, slot_tensor

ROOT = Path(__file__).parents[2]
TASK = "ab" * 16
SIZE = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def context() -> None:
    """The CUDA context, which keeps descriptors of its own, is there before a test counts descriptors."""
    import torch

    if torch.cuda.is_available():
        DeviceMemory.create(0, 1).close()
        torch.zeros(1, device="cuda").add_(1).item()


def cuda() -> Any:
    import torch

    return torch.cuda


def test_slices_of_a_view_are_its_bytes() -> None:
    """Begin and length of slices, also from the end and beyond it."""
    view = DeviceView(None, 0, 1000, 100)
    parts = [view[10:30], view[-10:], view[90:200], view[10:30][5:6], view[50:40]]
    assert [(p.pointer, p.nbytes) for p in parts] == [(1010, 20), (1090, 10), (1090, 10), (1015, 1), (1050, 0)]
    assert view.__cuda_array_interface__["data"] == (1000, False)


def test_what_is_held_is_not_read() -> None:
    """The supervisor's end of a queue on a GPU: it has a descriptor and statistics, no bytes."""
    read, write = os.pipe()
    queue = TensorQueue.create("q", 2, 64, on=DeviceFd(0, read))
    assert queue.spec.device == 0
    assert queue.statistics().slots == 2
    assert read in queue.fds
    with pytest.raises(AssertionError, match="is on a GPU"):
        HeldPayload(-1).view(1)
    queue.close()
    with pytest.raises(OSError):
        os.fstat(read)
    os.close(write)


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """A typed error; the engine goes on without such memory and says so."""
    with pytest.raises(DeviceMemoryError, match=r"cuda-bindings is not installed|no CUDA driver|cuInit"):
        DeviceMemory.create(0, 10)
    assert make_device_memory("cuda:0", {"state": 4096}) is None
    assert "no GPU memory that outlives a process" in caplog.text


def test_a_maker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends without an answer: an OSError, not a hang."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(OSError):
        ask(MakeMemory(device=0, sizes=[1]), [])


MAKER = """
import os, socket, sys
from ipc.channel import Channel
from ipc.device_memory import DeviceMemory
from ipc.messages.memory import MemoryReply
memory = DeviceMemory.create(0, int(sys.argv[2]))
memory.view[:4096] = memoryview(bytes(range(256)) * 16)
memory.view[-4096:] = memoryview(bytes(reversed(range(256))) * 16)
channel = Channel(socket.socket(fileno=int(sys.argv[1])), MemoryReply)
channel.send(MemoryReply(problem=""), [memory.fd])
channel.receive(None)
"""


def made_by_a_process_that_was_killed(size: int) -> int:
    """The descriptor of GPU memory whose maker is dead."""
    ours, theirs = Channel.pair()
    with Channel[MemoryReply](ours, MemoryReply) as channel, theirs:
        command = [sys.executable, "-c", MAKER, str(theirs.fileno()), str(size)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        with subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment) as maker:
            _, (fd,) = channel.receive(60)
            maker.send_signal(signal.SIGKILL)
    return fd


@pytest.mark.gpu
def test_memory_outlives_the_process_that_made_it() -> None:
    """Its maker is killed; the bytes are there for whoever has the descriptor; without descriptor and mapping the
    memory is free again."""
    import torch

    free = cuda().mem_get_info()[0]
    fd = made_by_a_process_that_was_killed(SIZE)
    assert free - cuda().mem_get_info()[0] >= SIZE
    with DeviceMemory.attach(fd, 0, SIZE) as memory:
        assert memory.view[:4096].tobytes() == bytes(range(256)) * 16
        assert memory.view[-4096:].tobytes() == bytes(reversed(range(256))) * 16
        assert memory.view[4096:8192].tobytes() == bytes(4096)
        tensor = torch.as_tensor(memory.view, device="cuda")
        assert tensor.data_ptr() == memory.view.pointer
    os.close(fd)
    assert int(tensor[255]) == 255, "a tensor keeps the mapping"
    del tensor
    assert free - cuda().mem_get_info()[0] < 4 << 20


@pytest.mark.gpu
def test_the_self_test_passes_and_finds_what_it_should() -> None:
    """What the engine takes for wan-demo at start: made, tested, clear; other bytes than the maker's are a problem."""
    sizes = device_sizes(load_model("wan-demo"))
    made = make_device_memory("cuda:0", sizes)
    assert made is not None
    for name, (device, fd) in made.items():
        with DeviceMemory.attach(fd, device, sizes[name]) as memory:
            assert not any(memory.view[: len(PATTERN)].tobytes())
    fds = [made["state"].fd]
    with pytest.raises(OSError, match="reads differently"):
        ask(ProbeMemory(device=0, sizes=[sizes["state"]]), fds)
    EngineMemory(load_model("wan-demo"), device=made).close()


@pytest.mark.gpu
def test_a_queue_on_a_gpu() -> None:
    """Tensors of the CPU and of the GPU go through; what is taken is on the GPU, and stays for the next process."""
    import torch

    memory = DeviceMemory.create(0, payload_bytes(2, 1 << 20))
    queue = TensorQueue.create("q", 2, 1 << 20, on=DeviceFd(0, os.dup(memory.fd)))
    memory.close()
    sent = torch.randn(3, 50, 70)
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        put_tensor(producer, TASK, 0, sent.cuda().transpose(1, 2), 1.0)
        put_tensor(producer, TASK, 1, sent.bfloat16(), 1.0)
    for epoch in (2, 3):
        consumer = TensorQueue.attach(queue.spec, queue.fds, "consumer", epoch)
        first, second = (slot_tensor(consumer.take(TASK, n, 1.0)) for n in (0, 1))
        assert first.is_cuda and torch.equal(first.cpu(), sent.transpose(1, 2))
        assert torch.equal(second.cpu(), sent.bfloat16())
        consumer.close()
        queue.reclaim("consumer", epoch)
    assert not queue.check_integrity()
    queue.close()


@pytest.mark.gpu
def test_states_on_a_gpu() -> None:
    """Two commits, then a new process loads the second; the supervisor checks the headers without a context."""
    import torch

    memory = DeviceMemory.create(0, state_payload_bytes(2, 1 << 20))
    states = StateSlots.create(2, 1 << 20, on=DeviceFd(0, os.dup(memory.fd)))
    memory.close()
    latents, history = torch.randn(4, 5, 6, device="cuda"), torch.randn(2, 4, 5, 6)
    with StateSlots.attach(states.spec, states.fds, 1) as stage:
        commit_tensors(stage.claim(TASK), 1, {"latents": latents})
        commit_tensors(stage.claim(TASK), 2, {"latents": latents + 1, "history": history})
    with StateSlots.attach(states.spec, states.fds, 2) as successor:
        loaded = load_tensors(successor.claim(TASK))
    assert loaded is not None
    step, tensors = loaded
    assert step == 2
    assert tensors["latents"].is_cuda and torch.equal(tensors["latents"], latents + 1)
    assert torch.equal(tensors["history"].cpu(), history)
    assert not states.check_integrity()
    states.close()
