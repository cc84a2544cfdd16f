"""Weights in shared memory: a second module sees the very bytes of the first, and cannot change them."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from hotreload.host_version import HostVersion
from hotreload.placement import PinnableMap, Placement, Slots, joined, lay_out
from ipc.messages.weights import WeightVersion


class Net(nn.Module):
    """Parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.register_buffer("scale", torch.ones(3))


def contents() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(t.shape, generator=generator) for name, t in Net().state_dict().items()}


SHAPES = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in Net().state_dict().items()}


def placed() -> tuple[Placement, WeightVersion]:
    tensors = contents()
    placement = Placement.create("net", SHAPES)
    for name, tensor in tensors.items():
        placement.tensors[name].copy_(tensor)
    return placement, placement.seal("vae", "abc")


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def test_a_module_bound_to_it_holds_its_bytes() -> None:
    """Parameters and buffers are views of the memory, bit for bit what was placed, without gradients."""
    placement, version = placed()
    with_views = Placement.attach(version, placement.fd, SHAPES)
    module = on_meta()
    Slots(module, {}).bind(with_views.tensors)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in contents().items())
    assert {t.data_ptr() for t in module.state_dict().values()} == {t.data_ptr() for t in with_views.tensors.values()}
    assert not any(p.requires_grad for p in module.parameters())
    assert all(t.data_ptr() % 64 == 0 for t in module.state_dict().values())


def test_the_memory_outlives_its_maker() -> None:
    """A forked process places weights, passes the descriptor and is killed: who holds the descriptor still binds to
    them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if (pid := os.fork()) == 0:
        try:
            placement, version = placed()
            socket.send_fds(theirs, [msgspec.msgpack.encode(version)], [placement.fd])
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    theirs.close()
    data, (fd,), _, _ = socket.recv_fds(ours, 1 << 16, 1)
    _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL
    placement = Placement.attach(msgspec.msgpack.decode(data, type=WeightVersion), fd, SHAPES)
    assert all(torch.equal(placement.tensors[name], tensor) for name, tensor in contents().items())
    os.close(fd)


def test_who_maps_it_copies_nothing() -> None:
    """All processes have the one copy, until one of them writes: then it has the page that it wrote to."""

    def copied() -> int:
        """KiB of this process that are a mapping's own."""
        text = Path("/proc/self/smaps").read_text()
        _, found, after = text.partition("memfd:large")
        assert found
        return int(after.partition("Anonymous:")[2].split()[0])

    shapes = {"large": (torch.float32, (4096, 256))}
    placement = Placement.create("large", shapes)
    version = placement.seal("vae", "abc")
    fd = os.dup(placement.fd)
    placement.close()
    del placement
    mapped = Placement.attach(version, fd, shapes)
    os.close(fd)
    assert copied() == 0
    mapped.tensors["large"][0, 0] = 1.0
    assert copied() == 4


def test_nobody_can_change_what_others_see() -> None:
    """A write through an attached tensor stays private; a shared writable mapping is refused; nobody can resize it."""
    placement, version = placed()
    one, other = (Placement.attach(version, placement.fd, SHAPES) for _ in range(2))
    one.tensors["scale"].zero_()
    assert torch.equal(other.tensors["scale"], contents()["scale"])
    assert other.fingerprint() == version.fingerprint
    with pytest.raises(PermissionError):
        mmap.mmap(other.fd, version.bytes, flags=mmap.MAP_SHARED)
    with pytest.raises(PermissionError):
        os.ftruncate(other.fd, 1)


def test_bytes_that_changed_are_found() -> None:
    """A single bit flipped before the seal took effect, or a version of other weights: refused at attach."""
    placement, version = placed()
    placement.tensors["scale"].view(torch.uint8)[5] ^= 1
    with pytest.raises(ValueError, match="its bytes hash to"):
        Placement.attach(version, placement.fd, SHAPES)
    with pytest.raises(ValueError, match="expected 4096"):
        Placement.attach(msgspec.structs.replace(version, bytes=4096), placement.fd, SHAPES)


def test_a_tensor_that_is_not_of_the_weights_is_found() -> None:
    """A module with a buffer outside its state dict cannot be bound: that buffer would have no value."""

    class Stray(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("stray", torch.ones(2), persistent=False)

    placement, _ = placed()
    with torch.device("meta"):
        module = Stray()
    with pytest.raises(AssertionError, match="stray"):
        Slots(module, {}).bind(placement.tensors)


def test_aliases_share_memory() -> None:
    """Two names in the module for one tensor of the weights: one memory."""
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)}).to("meta")
    placement = Placement.create("tied", {"a.weight": (torch.float32, (3, 3))})
    Slots(module, {"b.weight": "a.weight"}).bind(placement.tensors)
    assert module["a"].weight.data_ptr() == module["b"].weight.data_ptr()


def test_closing_leaves_the_tensors_and_no_descriptor(tmp_path: Path) -> None:
    """After `close` the tensors are still readable, and the descriptor is gone."""
    placement, _ = placed()
    fd = placement.fd
    scale = placement.tensors["scale"]
    placement.close()
    with pytest.raises(OSError):
        fcntl.fcntl(fd, fcntl.F_GETFD)
    assert torch.equal(scale, contents()["scale"])


def test_a_version_is_unmapped_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread, and only when nobody uses its tensors any more."""
    unmapped: list[int] = []
    monkeypatch.setattr(PinnableMap, "__del__", lambda self: unmapped.append(threading.get_ident()))
    placement, _ = placed()
    host, used = HostVersion.of(placement), placement.tensors["scale"]
    del placement
    other = HostVersion.of(placed()[0])
    host.let_go()
    other.let_go()

    def wait(count: int) -> None:
        deadline = time.monotonic() + 10
        while len(unmapped) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    wait(1)
    assert unmapped[0] != threading.get_ident()
    assert torch.equal(used, contents()["scale"])
    del used
    wait(2)


class Runtime:
    """CUDA's, on a machine that cannot lock pages."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        """Thread and size of each call."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked.append((threading.get_ident(), size))
        return 2


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr("hotreload.placement._cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return made


def test_pages_that_cannot_be_locked(runtime: Runtime) -> None:
    """It is tried once, in a thread of its own, which takes the runtime's error with it; the memory is as good as
    before, and says why it is not locked. Nothing is unlocked when it goes."""
    placement, version = placed()
    assert placement.unlocked == ""
    placement.pin()
    assert placement.unlocked == "CUDA error 2"
    ((thread, size),) = runtime.asked
    assert thread != threading.get_ident() and size == version.bytes
    assert all(torch.equal(placement.tensors[name], tensor) for name, tensor in contents().items())
    del placement


def test_a_copy_whose_pages_cannot_be_locked(runtime: Runtime) -> None:
    """A version that is mapped in the background is used all the same, and who maps it is told why; once."""
    placement, version = placed()
    told: list[str] = []
    host = HostVersion.mapping(version, placement.fd, SHAPES, (), 0, told.append)
    mapped = host.placement()
    assert all(torch.equal(mapped.tensors[name], tensor) for name, tensor in contents().items())
    deadline = time.monotonic() + 10
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert told == ["CUDA error 2"] and len(runtime.asked) == 1


@pytest.mark.gpu
def test_what_is_computed_after_pages_could_not_be_locked() -> None:
    """Memory that is locked already cannot be locked again: that error is nobody else's, least of all that of the next
    kernel."""
    placement, _ = placed()
    torch.cuda.set_device(0)
    placement.pin()
    assert placement.unlocked == ""
    placement.pin()
    assert placement.unlocked == "CUDA error 712"
    assert float(torch.ones(4, device="cuda").sum()) == 4.0
    assert torch.equal(placement.flat.to("cuda", non_blocking=True).cpu(), placement.flat)


def test_the_table_does_not_overlap() -> None:
    """Odd sizes and dtypes: every tensor starts aligned, after the end of the one before it."""
    table = lay_out({"a": (torch.bfloat16, (3,)), "b": (torch.float32, (5, 7)), "c": (torch.float16, (1,))})
    assert [t.offset for t in table.tensors] == [0, 64, 256]
    assert table.size == 320


def test_a_run_lies_together() -> None:
    """Tensors of a run are one right behind the other, in its order, where the first has its place; what comes next is
    aligned again. Whoever attaches with other runs is refused."""
    shapes = dict.fromkeys(("z.q", "a.k", "m.v"), (torch.float16, (3, 5))) | {"n": (torch.float32, (1,))}
    run = ["z.q", "a.k", "m.v"]
    table = lay_out(shapes, [run])
    assert [(t.name, t.offset) for t in table.tensors] == [("n", 0), ("z.q", 64), ("a.k", 94), ("m.v", 124)]
    placement = Placement.create("net", shapes, [run])
    for number, name in enumerate(run):
        placement.tensors[name].fill_(number)
    version = placement.seal("net", "c")
    attached = Placement.attach(version, placement.fd, shapes, [run])
    whole = joined([attached.tensors[name] for name in run])
    assert whole is not None and whole.shape == (9, 5)
    assert torch.equal(whole, torch.arange(3.0).half().repeat_interleave(3).unsqueeze(1).expand(9, 5))
    assert whole.data_ptr() == attached.tensors["z.q"].data_ptr()
    with pytest.raises(ValueError, match="not those of this model"):
        Placement.attach(version, placement.fd, shapes)


def test_what_is_not_together_is_not_joined() -> None:
    """A gap, another order, another dtype, another width, other memory: None. One alone is itself."""
    flat = torch.arange(24.0)
    a, b, c = flat[:6].view(2, 3), flat[6:12].view(2, 3), flat[15:21].view(2, 3)
    assert joined([a, b]) is not None
    for tensors in ([a, c], [b, a], [a, b.int()], [a, flat[6:12].view(3, 2)], [a, b.clone()], [a, b.t()]):
        assert joined(tensors) is None
    assert torch.equal(joined([c]), c)  # type: ignore[arg-type]
    biases = joined([flat[:3], flat[3:8]])
    assert biases is not None and torch.equal(biases, flat[:8])
