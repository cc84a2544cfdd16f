"""Disks that are really full or read-only, and what of a file is really on its disk. No root is needed where the kernel
lets users have namespaces of their own."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

CANNOT_MOUNT = 77

FS_IOC_FIEMAP = 0xC020660B
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_DELALLOC = 0x4
"""Written, and not on the disk: its place there is not even chosen."""
EXTENTS = 512
_HEAD, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQ16xL12x")

PREAMBLE = f"""
import subprocess, sys
directory = sys.argv[1]

def remount(options):
    subprocess.run(["mount", "-o", "remount," + options, directory], check=True)

if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], stderr=subprocess.DEVNULL).returncode:
    sys.exit({CANNOT_MOUNT})
"""


def run_on_small_disk(directory: Path, code: str, *arguments: str) -> list[str]:
    """Run `code` where `directory` is a tmpfs of its own, of 1 MiB, which it may `remount`; the words it prints."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        ran = subprocess.run(
            ["unshare", *user, "--mount", sys.executable, "-c", PREAMBLE + code, str(directory), *arguments],
            capture_output=True, text=True, timeout=120, env=environment, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs unshare(1)")
    if ran.returncode == CANNOT_MOUNT or ran.stderr.startswith("unshare:"):
        pytest.skip("needs the right to mount in a namespace of its own")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def unsynced_bytes(path: Path) -> int:
    """Bytes of a file that a loss of power would take: written since it was last synced, to new blocks.

    Only file systems that choose the place of data late (ext4, xfs, btrfs) can tell; the test is skipped on others, and
    a control must show that this one does.
    """
    with path.open("rb") as file:
        buffer = bytearray(_HEAD.pack(0, 2**64 - 1, 0, 0, EXTENTS, 0) + bytes(_EXTENT.size * EXTENTS))
        try:
            fcntl.ioctl(file.fileno(), FS_IOC_FIEMAP, buffer)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise
            pytest.skip("this file system does not tell what is on its disk")
    found = _HEAD.unpack_from(buffer)[3]
    assert found < EXTENTS
    extents = [_EXTENT.unpack_from(buffer, _HEAD.size + i * _EXTENT.size) for i in range(found)]
    return sum(length for _, _, length, flags in extents if flags & FIEMAP_EXTENT_DELALLOC)
