"""As systemd's descriptor store would: what the engine had it keep is passed to the next start, by name."""

from __future__ import annotations

import array
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.client import Client
from engine.models import load_model
from engine.systemd import Notify
from engine.vault import Origin, Vault, identity_of, name_of, parse
from engine.weights import Placed, WeightStore
from hotreload.files import stamp
from ipc.messages.weights import Component, WeightVersion
from tests.conftest import Video
from tests.engine.reloading import FILES, FIRST, SECOND, ask
from tests.engine.wire import EngineProcess, wait_for

PASS = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 200) for fd in sys.argv[1].split(",") if fd]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""
"""What systemd does between fork and exec."""


class Manager:
    """A service manager that keeps descriptors by name, and passes them to what it starts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept: dict[str, int] = {}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(directory / "notify"))
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def start(self, checkpoint: Path, placement: str = "fused") -> EngineProcess:
        names, fds = list(self.kept), list(self.kept.values())
        through = (sys.executable, "-c", PASS, ",".join(map(str, fds)), ":".join(names))
        options = ("--checkpoint", checkpoint, "--attention-backend", "sdpa", "--threads", "1")
        return EngineProcess(
            self.directory, *options, through=through, pass_fds=fds, placement=placement,
            NOTIFY_SOCKET=str(self.directory / "notify"),
        )  # fmt: skip

    def components(self) -> dict[str, str]:
        """Component -> content hash."""
        found = [named for name in list(self.kept) if (named := parse(name)) is not None]
        return {named.version.component: named.version.content for named in found}

    def close(self) -> None:
        self.socket.sendto(b"END=1", str(self.directory / "notify"))
        self._thread.join()
        self.socket.close()
        for fd in self.kept.values():
            os.close(fd)

    def _hear(self) -> None:
        while True:
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
            said = dict(line.split("=", 1) for line in data.decode().split("\n"))
            fds = array.array("i")
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            if "FDSTORE" in said:
                assert said["FDPOLL"] == "0" and len(fds) == 1 and valid(said["FDNAME"])
                self.kept[said["FDNAME"]] = fds[0]
            elif "FDSTOREREMOVE" in said:
                os.close(self.kept.pop(said["FDNAME"]))
            elif "END" in said:
                return


def valid(name: str) -> bool:
    """As systemd's `fdname_is_valid`."""
    return 0 < len(name) <= 255 and all(" " <= letter < "\x7f" and letter != ":" for letter in name)


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Manager]:
    manager = Manager(short_dir)
    yield manager
    manager.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The model that ships, with its transformer in a file of its own. The others were not changed for long."""
    (tmp_path / "model").mkdir()
    for name in ("text_encoder", "tokenizer", "vae"):
        (tmp_path / "model" / name).symlink_to(FIRST / name)
    shutil.copytree(FIRST / "transformer", tmp_path / "model" / "transformer")
    wait_for(lambda: identity_of(origin(tmp_path / "model")) is not None, "the copy to be old enough")
    return tmp_path / "model"


def origin(checkpoint: Path, **fields: str) -> Origin:
    component = Component(name="transformer", files=[str(checkpoint / FILES["transformer"])])
    return Origin("wan-demo", "cpu", "float32", component)._replace(**fields)


def mapped(pid: int | None) -> set[int]:
    """Inodes of the memory without a name that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "/memfd:" in line}


def inodes(manager: Manager) -> dict[str, int]:
    found = [(parse(name), os.fstat(fd).st_ino) for name, fd in list(manager.kept.items())]
    return {named.version.component: inode for named, inode in found if named is not None}


def frames(client: Client, path: Path) -> str:
    return Video(client.generate(ask(path)).path).sha256


def all_mapped(client: Client, manager: Manager) -> bool:
    stage_of = {"text_encoder": "text", "transformer": "dit", "vae": "vae"}
    pids = {stage.name: stage.pid for stage in client.status().stages}
    return all(inode in mapped(pids[stage_of[name]]) for name, inode in inodes(manager).items())


def test_a_service_that_is_started_again_reads_no_weights(manager: Manager, checkpoint: Path, tmp_path: Path) -> None:
    """Killed, and stopped in good order: the next start maps the same memory and gives the same frames, and nothing is
    read. After a change of programs, too, the manager is told when other weights are served, and when the first ones
    are back; and a reload is not remembered by the next start."""
    with manager.start(checkpoint) as first:
        first.wait_ready()
        golden = frames(Client(first.socket), tmp_path / "v.mp4")
        weights = Client(first.socket).status().weights
        wait_for(lambda: manager.components() == weights, "the weights to be kept")
        kept = inodes(manager)
        first.kill()
    with manager.start(checkpoint) as second:
        second.wait_ready()
        client = Client(second.socket)
        assert inodes(manager) == kept and all_mapped(client, manager)
        assert "was kept by the service manager" in second.log.read_text()
        assert frames(client, tmp_path / "v.mp4") == golden
    with manager.start(checkpoint) as third:
        third.wait_ready()
        client = Client(third.socket)
        assert inodes(manager) == kept and all_mapped(client, manager)
        client.reload_supervisor()
        client.reload(SECOND, ["transformer"])
        wait_for(lambda: set(manager.components()) == {"text_encoder", "vae"}, "the old transformer to be let go of")
        client.rollback()
        wait_for(lambda: manager.components() == weights, "the first transformer to be kept again")
        client.reload(SECOND, ["transformer"])
        wait_for(lambda: set(manager.components()) == {"text_encoder", "vae"}, "the old transformer to be let go of")
        third.kill()
    with manager.start(checkpoint) as fourth:
        fourth.wait_ready()
        assert frames(Client(fourth.socket), tmp_path / "v.mp4") == golden
        wait_for(lambda: manager.components() == weights, "the transformer that was read to be kept")


def test_files_that_have_changed_are_read(manager: Manager, checkpoint: Path, tmp_path: Path) -> None:
    """While the engine is down another transformer takes the place of the first: it is read and served, the manager
    lets go of the old one, and the others are not read."""
    with manager.start(checkpoint) as first:
        first.wait_ready()
        weights = Client(first.socket).status().weights
        wait_for(lambda: manager.components() == weights, "the weights to be kept")
        kept = inodes(manager)
    shutil.copy(SECOND / FILES["transformer"], checkpoint / FILES["transformer"])
    wait_for(lambda: identity_of(origin(checkpoint)) is not None, "the copy to be old enough")
    with manager.start(checkpoint) as second:
        second.wait_ready()
        found = Client(second.socket).status().weights
        assert found["transformer"] != weights["transformer"] and found["vae"] == weights["vae"]
        wait_for(lambda: manager.components() == found, "the new weights to be kept")
        after = inodes(manager)
        assert after.pop("transformer") != kept.pop("transformer") and after == kept


def test_memory_that_is_not_what_its_name_says(manager: Manager, checkpoint: Path, tmp_path: Path) -> None:
    """The stage that finds it out reads its files, and the others do not; the engine comes up, and the manager has what
    was read. What is of another kind of name is let go of."""
    with manager.start(checkpoint) as first:
        first.wait_ready()
        golden = frames(Client(first.socket), tmp_path / "v.mp4")
        weights = Client(first.socket).status().weights
        wait_for(lambda: manager.components() == weights, "the weights to be kept")
    (name,) = (name for name in manager.kept if "/transformer/" in name)
    size = os.fstat(manager.kept[name]).st_size
    os.close(manager.kept[name])
    manager.kept[name] = os.memfd_create("other")
    os.truncate(manager.kept[name], size)
    wrong = os.fstat(manager.kept[name]).st_ino
    before = inodes(manager)
    manager.kept["weights/of/an older program"] = os.memfd_create("older")
    with manager.start(checkpoint, "split") as second:
        second.wait_ready()
        assert frames(Client(second.socket), tmp_path / "v.mp4") == golden
        wait_for(lambda: manager.components() == weights, "the weights to be kept")
        after = inodes(manager)
        assert after.pop("transformer") != wrong and len(manager.kept) == 3
        assert after.items() <= before.items()
        assert "dit could not use the weights of an earlier run and reads them" in second.log.read_text()


def test_what_the_identity_depends_on(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, the device, the dtype, the file's place, and what changes when it is written to; there is none for a
    file that is missing, or was changed a moment ago, as the next change might not show."""
    file = checkpoint / FILES["transformer"]
    first = identity_of(origin(checkpoint))
    assert first == identity_of(origin(checkpoint)) is not None
    others = [origin(checkpoint, model="other"), origin(checkpoint, dtype="bfloat16"), origin(FIRST)]
    assert len({first, *map(identity_of, others)}) == 4
    times, size = file.stat(), file.stat().st_size
    file.write_bytes(bytes(size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity_of(origin(checkpoint)) is None
    changed = stamp(file).changed_ns / 1e9
    monkeypatch.setattr("engine.vault.time.time", lambda: changed + 3)
    assert identity_of(origin(checkpoint)) not in (None, first)
    file.unlink()
    assert identity_of(origin(checkpoint)) is None


def test_names_say_what_a_descriptor_is() -> None:
    """Of every model's longest one, in host memory and on a GPU: what systemd takes, and read back as it was. What is
    not of us is not read."""
    hash_ = "0123456789abcdef" * 2
    for number, device in ((None, "cpu"), (15, "cuda:15")):
        for component in load_model("wan2.2-i2v-a14b").components:
            version = WeightVersion(
                component=component, content=hash_, fingerprint=hash_, bytes=2**40, device=number
            )  # fmt: skip
            name = name_of(Placed(device, version, 3), hash_)
            assert valid(name)
            assert parse(name) == (device, version, hash_)
    for name in ("stored", "weights", "weights/a/b/c/d/e/f/g", f"weights/vae/cpu/-/{hash_}/{hash_}/many/{hash_}"):
        assert parse(name) is None


async def test_without_a_manager_nothing_is_kept(checkpoint: Path) -> None:
    """Nor is anything said; what was passed all the same, and is of nothing here, is closed."""
    fd = os.memfd_create("x")
    vault, store = Vault(Notify(None), {"weights/x": fd}), WeightStore()
    await vault.open(store, [origin(checkpoint)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    store.keep(
        "cpu", WeightVersion(component="transformer", content="c", fingerprint="f", bytes=1), os.memfd_create("")
    )
    await vault.settle(store, [origin(checkpoint)])
    assert vault.state().stored == []
    store.close()
