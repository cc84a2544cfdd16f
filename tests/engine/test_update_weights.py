"""Weights given over the socket, and descriptors that nobody asked for."""

from __future__ import annotations

import array
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine import AsyncClient, Client
from engine.arrays import given_tensors
from hotreload.given import pack
from ipc.errors import BadCheckpoint
from tests.conftest import Video
from tests.engine.reloading import FILES, FIRST, SECOND, ask
from tests.engine.wire import EngineProcess, RawClient, frame, wait_for


def send_with(client: RawClient, data: bytes, *fds: int) -> None:
    client.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def update(component: str = "vae", **fields: Any) -> bytes:
    return frame(type="update_weights", ref=9, component=component, **fields)


async def test_a_program_gives_weights(engine_process: EngineProcess, short_dir: Path) -> None:
    """numpy arrays over the socket are served as the same tensors from a file are, by both clients; a rollback returns
    to what was before."""
    engine_process.wait_ready()
    client = Client(engine_process.socket)
    tensors = load_file(SECOND / FILES["transformer"])
    first = client.status().weights["transformer"]
    given = client.update_weights("transformer", tensors)
    made = Video(client.generate(ask(short_dir / "given.mp4")).path)
    assert client.rollback().weights == {"transformer": first}
    read = client.reload(SECOND, ["transformer"])
    assert given.weights == read.weights
    assert Video(client.generate(ask(short_dir / "read.mp4")).path).sha256 == made.sha256
    as_float32 = {name: tensor.astype(np.float32) for name, tensor in load_file(FIRST / FILES["transformer"]).items()}
    done = await AsyncClient(engine_process.socket).update_weights("transformer", as_float32, when="pin")
    assert set(done.weights) == {"transformer"} and done.weights != given.weights
    client.reload(FIRST)


def test_what_is_not_weights_is_refused(engine_process: EngineProcess) -> None:
    """Said by name; the same connection goes on."""
    engine_process.wait_ready()
    client = Client(engine_process.socket)
    before = client.status().weights
    tensors = load_file(FIRST / FILES["vae"])
    name = next(iter(tensors))
    with pytest.raises(BadCheckpoint, match=f"missing: {name}"):
        client.update_weights("vae", {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(BadCheckpoint, match=f"{name} has the dtype int64"):
        client.update_weights("vae", {**tensors, name: np.zeros(3, np.int64)})
    with RawClient(engine_process.socket) as raw:
        assert raw.ask(update())["error"]["code"] == "bad_request"
        assert raw.ask(frame(type="status", ref=2))["status"]["weights"] == before


@pytest.mark.parametrize("kind", ["a file", "a pipe", "a memfd without seals", "one that can be written", "nonsense"])
def test_only_sealed_memory_is_looked_at(engine_process: EngineProcess, short_dir: Path, kind: str) -> None:
    engine_process.wait_ready()
    read, write = os.pipe()
    with (short_dir / "f").open("w+b") as file:
        memory = os.memfd_create("m", os.MFD_ALLOW_SEALING)
        os.truncate(memory, 4096)
        if kind in ("one that can be written", "nonsense"):
            seals = fcntl.F_SEAL_SHRINK | (fcntl.F_SEAL_WRITE if kind == "nonsense" else 0)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        fd = {"a file": file.fileno(), "a pipe": read}.get(kind, memory)
        before = engine_process.open_files()
        with RawClient(engine_process.socket) as raw:
            send_with(raw, update(), fd)
            reply = raw.receive()
            assert reply is not None and reply["error"]["code"] == "bad_checkpoint", reply
            says = "the memory" if kind == "nonsense" else "memfd" if kind in ("a file", "a pipe") else "seal"
            assert says in reply["error"]["message"]
            assert raw.ask(frame(type="status", ref=2))["type"] == "status"
        wait_for(lambda: engine_process.open_files() <= before, "the descriptors to be closed")
        for opened in (read, write, memory):
            os.close(opened)


@pytest.mark.parametrize("kind", ["with another message", "two at once", "many", "one after another", "before hello"])
def test_descriptors_that_nobody_asked_for_end_the_connection(engine_process: EngineProcess, kind: str) -> None:
    """They are closed, and other clients go on."""
    fd = pack(given_tensors({"t": np.zeros(3, np.float32)}))
    before = engine_process.open_files()
    with RawClient(engine_process.socket, greet=kind != "before hello") as raw:
        match kind:
            case "with another message":
                send_with(raw, frame(type="status", ref=2), fd)
            case "two at once":
                send_with(raw, update(), fd, fd)
            case "many":
                send_with(raw, update(), *[fd] * 200)
            case "one after another":
                send_with(raw, update()[:5], fd)
                send_with(raw, update()[5:8], fd)
            case "before hello":
                send_with(raw, frame(type="hello", ref=1, version=1), fd)
        assert raw.refusal_then_end()["code"] == "protocol_error"
    wait_for(lambda: engine_process.open_files() <= before, "the descriptors to be closed")
    assert Client(engine_process.socket).status().accepting
    os.close(fd)


def test_a_client_that_leaves_takes_its_descriptor_along(engine_process: EngineProcess) -> None:
    """It sent half a frame with it."""
    fd = pack(given_tensors({"t": np.zeros(3, np.float32)}))
    before = engine_process.open_files()
    with RawClient(engine_process.socket) as raw:
        send_with(raw, update()[:5], fd)
        wait_for(lambda: engine_process.open_files() > before, "the descriptor to arrive")
    wait_for(lambda: engine_process.open_files() <= before, "the descriptors to be closed")
    os.close(fd)


def test_packed_tensors_are_a_safetensors_file() -> None:
    """As safetensors itself reads it; nobody can write to it."""
    from safetensors.numpy import load

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float16), "c": np.zeros((0, 4))}
    fd = pack(given_tensors({**arrays, "d": arrays["a"].T}))
    try:
        found = load(os.pread(fd, os.fstat(fd).st_size, 0))
        assert found.keys() == {*arrays, "d"}
        for name, value in {**arrays, "d": arrays["a"].T}.items():
            assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.truncate(fd, 8)
    finally:
        os.close(fd)
