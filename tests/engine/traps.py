"""A directory that requests may name files in, and every way out of it that we know."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from PIL import Image


class World:
    """A root with traps in it, and a directory beside it that nothing may reach."""

    def __init__(self, directory: Path) -> None:
        self.root, self.outside = directory / "root", directory / "outside"
        for made in ("root/sub/deep", "root-evil", "outside/b"):
            (directory / made).mkdir(parents=True)  # the root itself may be there
        Image.new("RGB", (16, 16)).save(self.outside / "victim.png")
        (self.outside / "victim.mp4").write_bytes((self.outside / "victim.png").read_bytes())
        links = {
            "link": self.outside, "relative": "../outside", "sub/link": "../../outside",
            "sub/deep/link": "../../../outside", "chain": "link", "chain2": "sub/../chain", "up": "..",
            "sub/up": "../..", "slash": "/", "loop": "loop", "dangling": self.outside / "none",
            "evil": "../root-evil", "proc": "/proc/self", "dev": "/dev", "victim.mp4": self.outside / "victim.mp4",
            "gone.mp4": self.outside / "gone.mp4", "tty.mp4": "/dev/tty", "null.mp4": "/dev/null",
            "victim.png": self.outside / "victim.png", "zero.png": "/dev/zero", "inner.mp4": "sub/inner.mp4",
        }  # fmt: skip
        for name, target in links.items():
            (self.root / name).symlink_to(target)
        (self.root / "sub" / "inner.mp4").write_bytes(b"x")
        os.mkfifo(self.root / "fifo.mp4")
        (self.root / "directory.mp4").mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(self.root)
            listener.bind("socket.mp4")
            os.chdir(here)
        self.before = self.outside_files()

    def outside_files(self) -> dict[str, bytes]:
        parent = self.outside.parent
        found = [path for path in parent.rglob("*") if not path.is_relative_to(self.root) and path.is_file()]
        return {str(path): path.read_bytes() for path in found}

    def directories(self) -> Iterator[str]:
        """Directories that lead out, or nowhere, by every way we know; with the prefixes that hide them."""
        ways = [
            "..", "../outside", "../root-evil", "../root/../outside", "../../..", "link", "link/b", "relative",
            "sub/link", "sub/deep/link", "chain", "chain2", "up", "sub/up", "sub/up/outside", "up/outside", "slash",
            "slash/tmp", "loop", "loop/x", "dangling", "evil", "proc", "proc/root", "proc/cwd/..", "dev", "dev/fd",
            "dev/shm", "link/../outside", "up/root/../outside", "victim.mp4", "fifo.mp4", "socket.mp4",
            "\uff0e\uff0e", "\u2025/outside", "%2e%2e/outside", "..\\outside", "x" * 256, "x/" * 2000, "sub/\0",
            "\0", "link\0", "\ud800", ".. /outside", "sub/deep/../../../outside",
        ]  # fmt: skip
        for prefix in ("", "./", "sub/../", "sub/deep/../../", "sub//..//", "directory.mp4/../", f"{self.root}/"):
            for way in ways:
                yield prefix + way
        yield from (
            "/", "//", "/etc", "/proc/self", "/proc/self/cwd/..", "/proc/self/fd", "/dev", "/dev/fd", "/sys", "~",
            "~root", "~nobody", "~/..", str(self.outside), f"/{self.outside}", f"{self.root}/../outside",
            f"{self.root}-evil", f"{self.root}/../root-evil", str(self.outside).upper(),
            f"{self.outside}/../outside",
        )  # fmt: skip

    def outputs(self) -> Iterator[str]:
        for directory in self.directories():
            yield f"{directory}/x.mp4"
        for name in (

            "victim.mp4", "gone.mp4", "tty.mp4", "null.mp4", "inner.mp4", "fifo.mp4", "socket.mp4", "directory.mp4",
            "", ".", "..", ".mp4", "v.mp4/", "v.mp4/.", "v.mp4/..", "sub/", "v.mp4\0", "v.mp4\0.txt", "v\0.mp4",
            "v.json", "v", "x" * 252 + ".mp4", "\ud800.mp4", "v.mp4 ", "v.mp4\n", "v.mp4::$DATA", "v.mp4?x",
        ):  # fmt: skip
            yield name
            yield f"{self.root}/{name}"

    def inits(self) -> Iterator[str]:
        for directory in self.directories():
            yield f"{directory}/victim.png"
        names = ("victim.png", "zero.png", "fifo.mp4", "socket.mp4", "directory.mp4", ".", "", "none.png", "tty.mp4")
        for name in names:
            yield name
            yield f"{self.root}/{name}"
