"""Who is let in, what leaves the engine, and where its files may be."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from PIL import Image

from engine.admission import admit
from engine.models import load_model
from engine.params import SystemParams, UserParams
from engine.serve import system_params
from engine.server import served_users
from ipc.errors import BadConfig, EngineError
from ipc.messages.client import AnyClientMessage
from ipc.messages.server import AnyServerMessage
from tests.engine.traps import World
from tests.engine.wire import EngineProcess, RawClient, environment, frame, run_engine

MODEL = load_model("wan-demo")
NOBODY, STRANGER = 65534, 65533
STATUS = frame(type="status", ref=9)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


# Who is let in.


def test_who_is_served() -> None:
    """The owner and root; others when the operator lists them and gives them a directory of their own."""
    owner = os.geteuid()
    assert served_users(SystemParams()) == {owner, 0}
    assert served_users(SystemParams(allow_uids=(7, 8), output_root="/srv")) == {owner, 0, 7, 8}
    with pytest.raises(BadConfig, match="--output-root"):
        served_users(SystemParams(allow_uids=(7,)))
    with pytest.raises(BadConfig, match="--output-root"):
        served_users(SystemParams(allow_uids=(7,), output_root="/tmp/.."))


def test_the_allow_list_comes_from_the_command_or_the_file(tmp_path: Path) -> None:
    """`allow_uids` of a file; --allow-uid instead of it; what is no uid is refused."""
    config = tmp_path / "system.yaml"
    config.write_text("allow_uids: [1001, 1002]\noutput_root: /srv\n")
    assert system_params(config, {}).allow_uids == (1001, 1002)
    assert system_params(config, {"allow_uids": [7]}).allow_uids == (7,)
    for wrong in (-1, 2**32, "root"):
        with pytest.raises(BadConfig, match="allow_uids"):
            system_params(None, {"allow_uids": [wrong]})


def test_an_allow_list_needs_a_root(short_dir: Path) -> None:
    """`engine serve --allow-uid` without --output-root is refused with exit status 2, and nothing is left running."""
    os.chmod(short_dir, 0o711)
    where = ("--socket", short_dir / "e.sock", "--state-dir", short_dir / "state")
    ran = run_engine("serve", "--allow-uid", "12345", *where)
    assert ran.returncode == 2
    assert "--output-root" in ran.stderr
    assert not (short_dir / "e.sock").exists()


TALK = """
import os, sys
from pathlib import Path
from engine.client import Client
from engine.params import UserParams
from ipc.errors import EngineError
import asyncio, engine.connection, engine.decode
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
client = Client(sys.argv[1])
for ask in (
    lambda: client.status().model,
    lambda: client.submit(UserParams(prompt="x", output=sys.argv[3] + "/v.mp4")).position,
    lambda: client.submit(UserParams(prompt="x", output="/tmp/v.mp4")).position,
    lambda: client.shutdown(),
    lambda: client.reload_supervisor(),
    lambda: client.change_memory(2),
    lambda: len(client.memory_levels()),
    lambda: client.add_lora("x", "/x.safetensors"),
    lambda: client.remove_lora("x"),
    lambda: client.loras(),
):
    try:
        print(ask())
    except EngineError as error:
        print(error.code)
"""


def talk_as(uid: int, path: Path, root: Path) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", TALK, str(path), str(uid), str(root)],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


@as_root
def test_a_listed_user_is_served_and_no_other(short_dir: Path) -> None:
    """Of two users one is listed: it gets status and may submit below the root, and may not shut it down, reload,
    change its memory level or load LoRAs; the other is refused every time."""
    root = short_dir / "root"
    root.mkdir()
    os.chmod(short_dir, 0o711)
    with EngineProcess(short_dir, "--allow-uid", str(NOBODY), "--output-root", root) as engine:
        owners = ["permission_denied"] * 3
        expected = ["wan-demo", "0", "bad_request", *owners, "1", *owners[1:], "[]"]
        assert talk_as(NOBODY, engine.socket, root) == expected
        assert talk_as(STRANGER, engine.socket, root) == ["permission_denied"] * 10
        with RawClient(engine.socket) as client:
            assert client.ask(STATUS)["type"] == "status"


CHOOSE = """
import os, sys
from pathlib import Path
import engine.connection, engine.paths
from ipc.errors import EngineError
owner, other = (int(uid) for uid in sys.argv[2:])
reader, writer = os.pipe()
if not os.fork():
    os.setuid(owner)
    listener = engine.paths.SocketClaim(Path(sys.argv[1]), shared=True).bind()
    os.write(writer, b".")
    listener.setblocking(True)
    while True:
        listener.accept()
os.read(reader, 1)
os.setuid(other)
for default in (False, True):
    if default:
        engine.connection.socket_path = lambda _: Path(sys.argv[1])
    try:
        engine.connection._connect(Path(sys.argv[1]), 5.0).close()
        print("connected")
    except EngineError as error:
        print(error.code)
"""


@as_root
def test_a_client_talks_to_strangers_only_where_it_was_told_to(short_dir: Path) -> None:
    """The engine of another user at a path that was named, in that user's directory: a connection. At the default path,
    where anybody may have put it: `permission_denied`."""
    directory = short_dir / "d"
    directory.mkdir()
    os.chmod(short_dir, 0o711)
    os.chown(directory, NOBODY, NOBODY)
    os.chmod(directory, 0o711)
    with subprocess.Popen(
        [sys.executable, "-c", CHOOSE, str(directory / "e.sock"), str(NOBODY), str(STRANGER)],
        stdout=subprocess.PIPE, env=environment(), process_group=0,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        os.killpg(process.pid, 9)
    assert lines == [b"connected", b"permission_denied"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine of this module may write."""
    root = tmp_path_factory.mktemp("engine").resolve() / "root"
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[EngineProcess]:
    with (
        tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as directory,
        EngineProcess(Path(directory), "--output-root", root, "--max-queue", "1000") as process,
    ):
        yield process


def test_a_second_engine_on_the_socket_is_refused(engine: EngineProcess, short_dir: Path) -> None:
    """It leaves with a message that names the first, which keeps its socket and its clients."""
    before = engine.socket.stat()
    with RawClient(engine.socket) as client:
        for _ in range(2):
            ran = run_engine("serve", "--socket", engine.socket, "--state-dir", short_dir / "state")
            assert ran.returncode == 2
            assert f"pid {engine.process.pid}" in ran.stderr
        assert client.ask(STATUS)["type"] == "status"
    assert (engine.socket.stat().st_ino, engine.socket.stat().st_mode) == (before.st_ino, before.st_mode)
    with RawClient(engine.socket) as client:
        assert client.ask(STATUS)["status"]["pid"] == engine.process.pid


# What leaves the engine.

ABSOLUTE = re.compile(r"(?<![\w.~*/])/(?:[\w.@+~-]+/)*[\w.@+~-]+")
HANDLE = re.compile(r"0x[0-9a-f]{4,}|memfd|/proc/|/dev/shm|\bfd[ =]?\d+|Traceback|\.py\b|object at ", re.IGNORECASE)


def leaks(said: str, sent: str) -> list[str]:
    """Absolute paths that the client did not send, and traces of memory or of our code."""
    found = [path for path in ABSOLUTE.findall(said) if path not in sent]
    return found + [match.group() for match in HANDLE.finditer(said) if match.group() not in sent]


@pytest.mark.parametrize(
    "said",
    ["no /var/lib/x there", "No such file: '/etc/passwd'", "memfd:frames", "<Slot object at 0x7f12ab34>", "fd 12"],
)
def test_the_search_for_leaks_finds_them(said: str) -> None:
    """The control."""
    assert leaks(said, "v.mp4")
    assert not leaks("steps is 0; it must be 1/2 or and/or 3 to 1000, see docs", "v.mp4")


def wrong_params(root: Path) -> Iterator[dict[str, Any]]:
    """Requests that cannot be carried out, each in another way."""
    good = {"prompt": "x", "output": f"{root}/v.mp4"}
    bad_values: list[Any] = [-1, 0, 2**62, 1e308, "x", "", None, [], {}, [[]], b"x", True, "\0", "/", "../" * 50]
    fields = UserParams.__struct_fields__
    for name, value in itertools.product(fields, bad_values):
        yield {**good, name: value}
    for name in fields:
        yield {**good, name + "s": 1}
    (root / "text.png").write_text("not a picture")
    (root / "empty.png").touch()
    Image.new("RGB", (8, 8)).save(root / "small.png")
    for name, file in itertools.product(("image", "video"), ("text.png", "empty.png", "none.png", ".", "small.png/x")):
        yield {**good, name: f"{root}/{file}"}
        yield {**good, name: file}
    yield {**good, "image": f"{root}/small.png", "video": f"{root}/small.png"}
    yield {**good, "prompt": "x " * 9000}
    yield {**good, "prompt": "red circle " * 700}
    yield {**good, "negative_prompt": "x " * 9000}
    for output in ("v.avi", "none/v.mp4", "text.png/v.mp4", "/etc/v.mp4", "/nonexistent/v.mp4", "~root/v.mp4"):
        yield {**good, "output": output}
        yield {**good, "output": f"{root}/{output}"}


def test_errors_say_nothing_of_the_machine(engine: EngineProcess, root: Path) -> None:
    """Hundreds of requests that are wrong in every field, unknown ids, and broken frames: no reply has a path that was
    not in the request, a handle, or a piece of code."""
    refused = 0
    client = RawClient(engine.socket)
    for number, params in enumerate(wrong_params(root)):
        if number % 200 == 199:  # before it is slowed down
            client.close()
            client = RawClient(engine.socket)
        reply = client.ask(frame(type="submit", ref=number, params=params, subscribe=False))
        if reply["type"] == "accepted":
            client.ask(frame(type="cancel", ref=0, id=reply["id"]))
            continue
        refused += 1
        assert not leaks(reply["error"]["message"], repr(params)), reply
        assert reply["error"]["code"] != "internal", (params, reply)
    for kind in ("cancel", "subscribe"):
        for identity in ("", "x", "/etc/passwd", "0" * 32):
            reply = client.ask(frame(type=kind, ref=1, id=identity))
            assert not leaks(reply["error"]["message"], identity)
    client.close()
    for broken in (b"\0\0\0\1\xc1", b"\xff" * 8, frame(type="launch", ref=1), frame(type=1), STATUS[:-1] + b"\xc1"):
        with RawClient(engine.socket) as client:
            client.send(broken)
            assert not leaks(client.refusal_then_end()["message"], "")
    assert refused > 200


def test_no_message_of_a_client_can_name_memory() -> None:
    """Of what clients send, only these fields are texts, and none of them is a name in the engine: ids of tasks, a
    prompt, paths that are checked, and words of a closed list; of the owner also the files of a reload and of a LoRA,
    and its name, which is one of a table of the supervisor's; a memory level, and numbers that may be missing."""
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    for message in get_args(AnyClientMessage):
        fields = {f.name for f in msgspec.structs.fields(message) if f.type not in (int, bool)}
        texts["Owner only" in (message.__doc__ or "")] |= fields
    assert texts[False] == {"client", "params", "id"}
    assert texts[True] == {
        "checkpoint",
        "components",
        "when",
        "canary",
        "manifest",
        "stages",
        "name",
        "files",
        "component",
        "level",
        "blocks",
        "attention_backend",
        "threads",
        "placement",
    }
    values = {f.name for f in msgspec.structs.fields(UserParams) if "str" in str(f.type)}
    assert values == {"prompt", "negative_prompt", "image", "video", "output", "lora"}
    for message in get_args(AnyServerMessage):
        assert not {f.name for f in msgspec.structs.fields(message)} & {"fd", "fds", "handle", "slot", "address"}


# Where its files may be.


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Where the engine's working directory is the root, so that relative paths mean it."""
    world = World(tmp_path.resolve())
    monkeypatch.chdir(world.root)
    yield world
    assert world.outside_files() == world.before
    assert not list(world.outside.parent.rglob("x.mp4"))


def test_no_path_leads_out_of_the_root(world: World) -> None:
    """Hundreds of outputs and init files that leave the root, or are no files, are all refused, at admission."""
    system = SystemParams(output_root=str(world.root))
    outputs = [UserParams(prompt="x", output=path) for path in world.outputs()]
    inits = [
        UserParams(prompt="x", output=f"{world.root}/v.mp4", image=path if kind else None, video=None if kind else path)
        for path in world.inits()
        for kind in (True, False)
    ]
    assert len(outputs) > 200 and len(inits) > 200
    admitted = []
    for user in outputs + inits:
        try:
            admit(user, MODEL, system)
            admitted.append(user)
        except EngineError as error:
            assert error.code == "bad_request"
            assert not leaks(str(error), repr(user))
    assert not admitted


def test_paths_that_stay_are_taken(world: World) -> None:
    """The control: ways about the tree that end below the root, links inside it too."""
    system = SystemParams(output_root=str(world.root))
    (world.root / "inside").symlink_to("sub/deep")
    paths = ("v.mp4", "./v.mp4", "sub/../v.mp4", "inside/v.mp4", "up/root/v.mp4", "ü.mp4", "proc/cwd/v.mp4")
    for path in [*paths, f"{world.root}/sub/v.mp4"]:
        job = admit(UserParams(prompt="x", output=path), MODEL, system)
        assert Path(job.output).is_relative_to(world.root)


def test_no_path_leads_out_over_the_wire(engine: EngineProcess, root: Path) -> None:
    """The same outputs on a live engine: all refused, before anything is computed."""
    world = World(root.parent)
    paths = [path for path in world.outputs() if path.startswith("/") and "\ud800" not in path]
    assert len(paths) > 60
    with RawClient(engine.socket) as client:
        listed = len(client.ask(frame(type="list", ref=1))["tasks"])
        for number, path in enumerate(paths):
            reply = client.ask(frame(type="submit", ref=number, params={"prompt": "x", "output": path}))
            assert reply["type"] == "refused" and reply["error"]["code"] == "bad_request", (path, reply)
        assert len(client.ask(frame(type="list", ref=1))["tasks"]) == listed
    assert world.outside_files() == world.before


def test_a_race_after_admission_is_lost(engine: EngineProcess, root: Path) -> None:
    """An output and an init file are accepted; then their directories become links out of the root: both requests fail
    with a typed error that does not tell where the links go, and nothing is read or written there."""
    outside = root.parent / "race"
    for made in (outside / "deep", root / "race" / "deep", root / "race2"):
        made.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(root / "race2" / "i.png")
    Image.new("RGB", (16, 16), (255, 0, 0)).save(outside / "i.png")
    small = {"prompt": "x", "steps": 1, "height": 32, "width": 32, "num_frames": 5}
    requests = [
        {**small, "output": f"{root}/race/deep/v.mp4"},
        {**small, "output": f"{root}/w.mp4", "image": f"{root}/race2/i.png"},
    ]
    something_first = {**small, "steps": 100, "output": f"{root}/first.mp4", "priority": 10}
    with RawClient(engine.socket) as client:
        # The swap comes before these are begun.
        assert client.ask(frame(type="submit", ref=1, params=something_first, subscribe=False))["type"] == "accepted"
        ids = []
        for params in requests:
            reply = client.ask(frame(type="submit", ref=2, params=params, subscribe=False))
            assert reply["type"] == "accepted", reply
            ids.append(reply["id"])
        (root / "race").rename(root / "race-moved")
        (root / "race").symlink_to(outside)
        (root / "race2").rename(root / "race2-moved")
        (root / "race2").symlink_to(outside)
        ends = []
        for identity in ids:
            assert client.ask(frame(type="subscribe", ref=3, id=identity))["type"] == "ok"
            while (event := client.receive()) is not None and event["type"] == "progress":
                pass
            assert event is not None and event["type"] == "failed", event
            ends.append(event["error"])
    assert [end["code"] for end in ends] == ["output_error", "bad_request"]
    for end, params in zip(ends, requests, strict=True):
        assert not leaks(end["message"], repr(params))
    assert sorted(path.name for path in outside.rglob("*")) == ["deep", "i.png"]


def test_the_modes_of_a_running_engine(engine: EngineProcess) -> None:
    """Socket 0600 in a directory of 0700; the journal 0600 in a directory of 0700."""
    modes = {path: path.stat().st_mode & 0o777 for path in (engine.socket, engine.socket.parent)}
    assert list(modes.values()) == [0o600, 0o700]
    state = engine.socket.parent / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in state.glob("journal.sqlite3*"))
