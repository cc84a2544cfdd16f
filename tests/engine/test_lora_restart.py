"""LoRA adapters outlive the engine that they were added to: one that is started again reads the same files, and says
which are not there any more, or hold something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine import Supervisor, SystemParams
from engine.client import Client
from engine.journal import Journal
from ipc.errors import BadRequest, Cancelled, NotFound, OutputError
from tests.conftest import Video, until
from tests.engine.adapters import ask, fresh_start, write_adapter, write_files
from tests.engine.wire import EngineProcess, wait_for


@asynccontextmanager
async def engine(directory: Path) -> AsyncIterator[Supervisor]:
    params = SystemParams(placement="fused", device="cpu", state_dir=str(directory / "state"))
    async with Supervisor(params) as supervisor:
        yield supervisor


def names(supervisor: Supervisor) -> dict[str, str]:
    return {info.name: info.state for info in supervisor.loras()}


async def busy(supervisor: Supervisor, directory: Path) -> str:
    """A request that the engine is still at when it is stopped."""
    accepted = await supervisor.submit(ask(directory / "busy.mp4", steps=1000))
    await until(lambda: any(task.state == "running" for task in supervisor.tasks()), "the first request to begin")
    return accepted.id


async def kept(directory: Path) -> list[tuple[str, bool]]:
    """(name, whether requests can name it) of what is on disk."""
    journal = Journal(directory / "state")
    await journal.open()
    try:
        return [(each.adapter.name, each.named) for each in await journal.adapters("wan-demo")]
    finally:
        await journal.close()


async def test_a_restarted_engine_has_them_again(tmp_path: Path) -> None:
    """Two of three are added for good, the third is removed while a queued request wants it. After a restart the
    queued requests give what fresh starts with their adapters give, new requests can name the two, and what nobody
    wants any more is not read again at the next start."""
    files, golden = write_files(tmp_path), {}
    for name in ("a", "b"):
        golden[name] = await fresh_start(tmp_path, (f"{name}:1",))
    async with engine(tmp_path) as supervisor:
        for name, file in files.items():
            await supervisor.add_lora(name, str(file))
        blocker = await busy(supervisor, tmp_path)
        queued = {name: await supervisor.submit(ask(tmp_path / f"{name}.mp4", name)) for name in ("a", "b")}
        await supervisor.remove_lora("b")
    assert await kept(tmp_path) == [("a", True), ("c", True), ("b", False)]
    async with engine(tmp_path) as supervisor:
        await supervisor.cancel(blocker)
        new = await supervisor.submit(ask(tmp_path / "new.mp4", "a"))
        assert names(supervisor) == {"a": "loaded", "c": "loaded", "b": "draining"}
        with pytest.raises(BadRequest, match="no LoRA has the name 'b'"):
            await supervisor.submit(ask(tmp_path / "other.mp4", "b"))
        for name, accepted in queued.items():
            assert Video((await supervisor.result(accepted.id)).path).sha256 == golden[name]
        assert Video((await supervisor.result(new.id)).path).sha256 == golden["a"]
    async with engine(tmp_path) as supervisor:
        assert names(supervisor) == {"a": "reading", "c": "reading"}
        await supervisor._loras.taken_back()
        assert names(supervisor) == {"a": "loaded", "c": "loaded"}
    assert await kept(tmp_path) == [("a", True), ("c", True)]


async def test_files_that_are_gone_or_changed(tmp_path: Path) -> None:
    """Of three adapters that queued requests want, one file is deleted, one replaced by another adapter, and one is as
    it was: the first two requests end with an error that says which, the third and one without any are carried out.
    The two are not offered; the changed one never again, the deleted one once its file is back, or its name is
    removed."""
    files = write_files(tmp_path)
    async with engine(tmp_path) as supervisor:
        for name, file in files.items():
            await supervisor.add_lora(name, str(file))
        blocker = await busy(supervisor, tmp_path)
        queued = {name: await supervisor.submit(ask(tmp_path / f"{name}.mp4", name)) for name in "abc"}
        plain = await supervisor.submit(ask(tmp_path / "plain.mp4"))
    files["a"].unlink()
    write_adapter(files["b"], 9, 2)
    async with engine(tmp_path) as supervisor:
        await supervisor.cancel(blocker)
        for name, words in {"a": r"a\.safetensors cannot be read: No such file", "b": "the file was changed"}.items():
            with pytest.raises(NotFound, match=f"the LoRA {name} .* could not be loaded again .*{words}") as raised:
                await supervisor.result(queued[name].id)
            assert str(tmp_path) not in str(raised.value)
        await supervisor.result(queued["c"].id)
        await supervisor.result(plain.id)
        assert names(supervisor) == {"c": "loaded"}
        with pytest.raises(BadRequest, match="no LoRA has the name 'a'; loaded are c"):
            await supervisor.submit(ask(tmp_path / "again.mp4", "a"))
    assert sorted(await kept(tmp_path)) == [("a", True), ("c", True)]
    async with engine(tmp_path) as supervisor:
        await supervisor._loras.taken_back()
        assert names(supervisor) == {"c": "loaded"}
        await supervisor.remove_lora("a")
        with pytest.raises(NotFound):
            await supervisor.remove_lora("a")
    assert await kept(tmp_path) == [("c", True)]


async def test_a_disk_that_comes_late(tmp_path: Path) -> None:
    """An adapter whose file is not there at one start, and is at the next."""
    file = write_adapter(tmp_path / "a.safetensors", 1, 4)
    async with engine(tmp_path) as supervisor:
        await supervisor.add_lora("a", str(file))
    away = file.rename(tmp_path / "away")
    async with engine(tmp_path) as supervisor:
        await supervisor._loras.taken_back()
        assert names(supervisor) == {}
        await supervisor.add_lora("b", str(write_adapter(tmp_path / "b.safetensors", 2, 4)))
    away.rename(file)
    async with engine(tmp_path) as supervisor:
        await supervisor._loras.taken_back()
        assert names(supervisor) == {"a": "loaded", "b": "loaded"}


async def test_a_request_that_waits_for_its_adapter_can_be_cancelled(tmp_path: Path) -> None:
    """Right after a restart, before the file is read: it ends at once, and is not carried out later."""
    file = write_adapter(tmp_path / "a.safetensors", 1, 4)
    async with engine(tmp_path) as supervisor:
        await supervisor.add_lora("a", str(file))
        await busy(supervisor, tmp_path)
        queued = await supervisor.submit(ask(tmp_path / "v.mp4", "a"))
    async with engine(tmp_path) as supervisor:
        assert queued.id in {task.id for task in supervisor.tasks()}
        assert queued.id not in supervisor._scheduler
        await supervisor.cancel(queued.id)
        with pytest.raises(Cancelled):
            await supervisor.result(queued.id)
        await supervisor._loras.taken_back()
        assert queued.id not in supervisor._scheduler
        assert supervisor.check_integrity() == []


async def test_what_cannot_be_written_down_is_not_offered(tmp_path: Path) -> None:
    """The journal does not take it: adding and removing fail, and change nothing."""
    first, second = (write_adapter(tmp_path / f"{seed}.safetensors", seed, 2) for seed in (1, 2))
    async with engine(tmp_path) as supervisor:
        await supervisor.add_lora("first", str(first))
        journal = supervisor._journal
        assert journal is not None
        await journal._on_thread(journal._execute, "ALTER TABLE adapters RENAME TO away", ())
        with pytest.raises(OutputError, match="nothing was changed"):
            await supervisor.add_lora("second", str(second))
        with pytest.raises(OutputError, match="nothing was changed"):
            await supervisor.remove_lora("first")
        assert names(supervisor) == {"first": "loaded"}
        assert len(supervisor._loras.adapters.holdings()) == 1
        await journal._on_thread(journal._execute, "ALTER TABLE away RENAME TO adapters", ())
        await supervisor.remove_lora("first")
        assert names(supervisor) == {}
    assert [named for _, named in await kept(tmp_path)] == [False]


def test_the_supervisor_is_killed(short_dir: Path, tmp_path: Path) -> None:
    """SIGKILL with a request in the queue that wants an adapter: the next start carries it out, with the frames of a
    fresh start with that adapter."""
    file = write_files(tmp_path)["a"]
    golden = asyncio.run(fresh_start(tmp_path, ("a:1",)))
    with EngineProcess(short_dir) as first:
        first.wait_ready()
        client = Client(first.socket)
        client.add_lora("a", file)
        blocker = client.submit(ask(tmp_path / "busy.mp4", steps=1000))
        queued = client.submit(ask(tmp_path / "v.mp4", "a"))
        first.kill()
    with EngineProcess(short_dir) as second:
        client = Client(second.socket)
        client.cancel(blocker.id)
        wait_for(lambda: [i.state for i in client.loras()] == ["loaded"], "the adapter to be read again")
        assert Video(client.result(queued.id).path).sha256 == golden
