"""What stands in place of a file of weights: every reader refuses all but regular files, at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hotreload.lora import read_lora
from hotreload.pth import read_pth
from hotreload.reading import Files
from hotreload.safetensors_file import read_header
from hotreload.tables import check_archive
from ipc.errors import BadCheckpoint


def open_weights(path: Path, label: str) -> object:
    with Files(label) as files:
        return files.open(path)


READERS: list[Callable[[Path, str], object]] = [
    read_header, check_archive, read_pth, open_weights, lambda path, label: read_lora(path, "transformer", {}, label),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, read: Callable[[Path, str], object]) -> None:
    """A FIFO without a writer, a link to /dev/zero, a socket, a directory: `BadCheckpoint`, no wait, no memory."""
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.safetensors"))
        problems = {
            "fifo": "it is a FIFO; put a regular file there",
            "zero": "it is a device; put a regular file there",
            "folder": "Is a directory",
            "socket": "No such device or address",
        }
        for name, problem in problems.items():
            with pytest.raises(BadCheckpoint, match=rf"^vae.*cannot be read: {problem}$"):
                read(tmp_path / f"{name}.safetensors", "vae")
