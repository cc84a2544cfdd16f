from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipc.counters import ProgressCounter
from ipc.memory import PAGE_BYTES, SharedMemory, round_up
from tests.ipc.conftest import resident_bytes


def test_two_handles_show_the_same_bytes() -> None:
    """Bytes written through one handle are read through another one on the same descriptor."""
    with SharedMemory.create("a", 100) as made, SharedMemory.attach(made.fd, 100) as attached:
        made.view[:3] = b"abc"
        assert bytes(attached.view[:4]) == b"abc\0"
        assert len(attached.view) == attached.size == 100


def test_pages_are_allocated_when_made() -> None:
    """After `create` the file has all its blocks, before anybody touched a byte."""
    with SharedMemory.create("a", 64 * PAGE_BYTES) as memory:
        assert os.fstat(memory.fd).st_blocks * 512 >= 64 * PAGE_BYTES


def test_memory_that_is_not_there_is_an_error_at_once() -> None:
    """Where the system grants 1 MiB per file, 2 MiB are an OSError in `create`, and no descriptor is left open."""
    code = (
        "import os, resource\n"
        "from ipc.memory import SharedMemory\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "before = os.listdir('/proc/self/fd')\n"
        "SharedMemory.create('fits', 1 << 20).close()\n"
        "try:\n"
        "    SharedMemory.create('does not', 2 << 20)\n"
        "except OSError as error:\n"
        "    assert os.listdir('/proc/self/fd') == before\n"
        "    print(error.strerror)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "cannot allocate 2097152 bytes for 'does not': File too large", run.stderr


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_byte_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 byte"):
        SharedMemory.create("a", size)


def test_attaching_with_another_size_is_refused() -> None:
    """A holder who expects another size than was made gets a ValueError with both."""
    with SharedMemory.create("a", 100) as memory, pytest.raises(ValueError, match="got 100 bytes, expected 200"):
        SharedMemory.attach(memory.fd, 200)


def test_memory_that_could_be_shrunk_is_refused() -> None:
    """A memfd without seals might be truncated under a mapping, which is a SIGBUS: it is not attached."""
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, 100)
        with pytest.raises(ValueError, match="not sealed"):
            SharedMemory.attach(fd, 100)
    finally:
        os.close(fd)


def test_nobody_can_change_the_size() -> None:
    with SharedMemory.create("a", 100) as memory:
        for size in (10, 1000):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, size)


def test_descriptors_do_not_leak_into_children() -> None:
    with SharedMemory.create("a", 100) as made, SharedMemory.attach(made.fd, 100) as attached:
        assert not os.get_inheritable(made.fd)
        assert not os.get_inheritable(attached.fd)


def test_closing_leaves_views_readable() -> None:
    """A view outlives `close`: its bytes stay mapped until it is gone, and only then the mapping goes."""
    memory = SharedMemory.create("kept alive", 100)
    part = memory.view[:3]
    part[:] = b"abc"
    memory.close()
    memory.close()
    assert bytes(part) == b"abc"
    assert "kept alive" in Path("/proc/self/maps").read_text()
    del part
    gc.collect()
    assert "kept alive" not in Path("/proc/self/maps").read_text()


def test_closed_memory_says_so() -> None:
    memory = SharedMemory.create("a", 100)
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        _ = memory.view
    with pytest.raises(ValueError, match="closed"):
        _ = memory.fd


def test_memory_that_is_made_but_not_mapped_is_not_resident() -> None:
    """The supervisor holds 64 MiB for others without having them in its own resident set."""
    before = resident_bytes()
    with SharedMemory.create("a", 64 << 20):
        assert resident_bytes() - before < 32 << 20


def test_round_up() -> None:
    assert [round_up(size, 8) for size in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_a_counter_counts_across_handles_and_wraps() -> None:
    """Increments through one handle show in the other; after 2**64 - 1 comes 0."""
    with ProgressCounter.create() as made, ProgressCounter.attach(made.fd) as attached:
        assert made.value == 0
        attached.increment()
        attached.increment()
        assert made.value == 2
        with SharedMemory.attach(made.fd, PAGE_BYTES) as raw:
            raw.view[:8] = b"\xff" * 8
        attached.increment()
        assert made.value == 0
