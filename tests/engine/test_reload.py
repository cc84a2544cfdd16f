"""Live reload of weights on the whole engine, with both revisions of the model that ships. Most tests share an engine,
which serves the first revision when each begins."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from engine import Supervisor, SystemParams
from engine.checkpoint import open_components
from engine.loader import Loader
from engine.params import ModelParams
from engine.weights import Placed
from hotreload.given import GivenTensor
from ipc.errors import (
    BadCheckpoint,
    BadConfig,
    NotFound,
    OutOfMemory,
    ServerUnavailable,
    StageFailed,
    Superseded,
)
from ipc.messages.client import Reload
from ipc.messages.weights import WeightChange
from tests.conftest import Video, until
from tests.engine.reloading import FILES, FIRST, SECOND, ask, denoising, engine, order, placed, vary, video
from tools.chaos import pid_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

Golden = dict[str, str]
"""Content hash of the transformer -> SHA-256 of the frames of `ask`."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Supervisor]:
    async with engine() as supervisor:
        yield supervisor


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def golden(shared: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """What each revision makes of the request, first the first."""
    folder, found = tmp_path_factory.mktemp("golden"), {}
    for directory in (FIRST, SECOND):
        await shared.reload(order(directory))
        found[shared.status().weights["transformer"]] = await video(shared, folder / "v.mp4")
    assert len(set(found.values())) == 2, "the revisions differ in what they make"
    return found


@pytest_asyncio.fixture(loop_scope="module")
async def supervisor(shared: Supervisor, golden: Golden) -> AsyncIterator[Supervisor]:
    """Serves the first revision, as its rollback would the second; afterwards nothing but what is served is placed."""
    await shared.reload(order(SECOND))
    await shared.reload(order(FIRST))
    yield shared
    await shared.reload(order(FIRST, "transformer", "text_encoder", "vae"))
    serving = {name: [content] for name, content in shared.status().weights.items()}
    await until(lambda: placed(shared) == serving, f"{serving} and nothing else is placed")


async def test_reload_and_rollback(supervisor: Supervisor, golden: Golden, tmp_path: Path) -> None:
    """New weights, the same again, and back, which is read again once its memory has been let go of. A second rollback
    returns to what the first came from."""
    first, second = golden
    before = supervisor.status().weights
    done = await supervisor.reload(order())
    assert done.weights == {"transformer": second}
    assert await video(supervisor, tmp_path / "v.mp4") == golden[second]
    assert supervisor.status().weights == {**before, **done.weights}
    again = await supervisor.reload(order())
    assert again.weights == {} and again.unchanged == done.weights
    assert placed(supervisor)["transformer"] == [second]
    back = await supervisor.rollback()
    assert back.weights == {"transformer": first} and back.bytes > 0
    assert await video(supervisor, tmp_path / "v.mp4") == golden[first]
    assert {v.content for v in supervisor.versions() if v.state == "serving"} == set(before.values())
    assert (await supervisor.rollback()).weights == {"transformer": second}
    assert await video(supervisor, tmp_path / "v.mp4") == golden[second]


async def test_pinned_weights_are_returned_to_without_their_files(
    supervisor: Supervisor, golden: Golden, tmp_path: Path
) -> None:
    _, second = golden
    shutil.copytree(SECOND, tmp_path / "gone")
    await supervisor.reload(order(tmp_path / "gone"))
    await supervisor.reload(order(FIRST, when="pin"))
    shutil.rmtree(tmp_path / "gone")
    assert sorted(placed(supervisor)["transformer"]) == sorted(golden)
    done = await supervisor.rollback()
    assert done.weights == {"transformer": second} and done.bytes == 0
    assert await video(supervisor, tmp_path / "v.mp4") == golden[second]


async def test_what_is_pinned_makes_way(
    supervisor: Supervisor, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two versions: a reload with another one pinned lets go of that, and reads again."""
    first, second = golden
    await supervisor.reload(order(when="pin"))
    third, rooms = vary(tmp_path / "third", 1), []
    read = Loader.read

    async def with_little_room(loader: Loader, *asked: Any) -> list[Placed]:
        rooms.append(sorted(placed(supervisor)["transformer"]))
        if len(rooms[-1]) > 1:
            raise OutOfMemory("there is no room for a third version")
        return await read(loader, *asked)

    with monkeypatch.context() as patched:
        patched.setattr(Loader, "read", with_little_room)
        done = await supervisor.reload(order(third))
    assert rooms == [sorted([first, second]), [second]]
    assert supervisor.status().weights["transformer"] == done.weights["transformer"]
    assert done.weights["transformer"] not in golden


@pytest.mark.parametrize("change", ["other weights", "cut short", "gone"])
async def test_no_return_to_files_that_have_changed(
    supervisor: Supervisor, golden: Golden, tmp_path: Path, change: str
) -> None:
    """The memory was let go of, and the files are others: a typed error, and what is served goes on."""
    first, _ = golden
    file = shutil.copytree(SECOND, tmp_path / "changed") / FILES["transformer"]
    await supervisor.reload(order(tmp_path / "changed"))
    await supervisor.reload(order(FIRST))
    await until(lambda: placed(supervisor)["transformer"] == [first], "the second revision is let go of")
    if change == "other weights":
        shutil.copy(vary(tmp_path / "other", 1) / FILES["transformer"], file)
    elif change == "cut short":
        os.truncate(file, file.stat().st_size - 100)
    else:
        file.unlink()
    with pytest.raises(NotFound if change == "other weights" else BadCheckpoint, match=r"changed since|diffusion_pyt"):
        await supervisor.rollback()
    assert supervisor.status().weights["transformer"] == first
    assert await video(supervisor, tmp_path / "v.mp4") == golden[first]


async def test_running_requests_finish_on_what_they_began_with(
    supervisor: Supervisor, golden: Golden, tmp_path: Path
) -> None:
    """While one is denoised, weights change: it ends as if nothing had, the next one is made with the new weights, and
    both say so."""
    first, second = golden
    undisturbed = await video(supervisor, tmp_path / "v.mp4", steps=200)
    running = asyncio.create_task(supervisor.generate(ask(tmp_path / "old.mp4", steps=200)))
    await until(lambda: denoising(supervisor, 3), "the third step")
    done = await supervisor.reload(order())
    assert done.running == 1
    states = {v.content: (v.state, v.running) for v in supervisor.versions() if v.component == "transformer"}
    assert states == {first: ("previous", 1), second: ("serving", 0)}
    new = await supervisor.generate(ask(tmp_path / "new.mp4"))
    for content in (first, second):  # both are in memory as long as the request runs
        back = await supervisor.rollback()
        assert back.weights == {"transformer": content} and back.bytes == 0
    old = await running
    assert (Video(old.path).sha256, old.metadata["weights"]["transformer"]) == (undisturbed, first)
    assert (Video(new.path).sha256, new.metadata["weights"]["transformer"]) == (golden[second], second)
    await until(lambda: placed(supervisor)["transformer"] == [second], "the first revision is let go of")


async def test_now_changes_running_requests_and_says_so(supervisor: Supervisor, golden: Golden, tmp_path: Path) -> None:
    """To the new weights, and by a rollback back again: the metadata names the steps. Another request that changes at
    these has the same frames, also when the dit is killed between the changes."""
    first, second = golden
    fields = {"steps": 200}
    running = await supervisor.submit(ask(tmp_path / "mixed.mp4", **fields))
    await until(lambda: denoising(supervisor, 3), "the third step")
    done = await supervisor.reload(order(when="now"))
    assert done.running == 0, "it does not finish on the old weights"
    (to,) = supervisor._pool.get(running.id).changes
    await until(lambda: denoising(supervisor, to.step + 3), "a step with the new weights")
    assert (await supervisor.rollback("now")).running == 0
    mixed = await supervisor.result(running.id)
    there, back = mixed.metadata["weight_changes"]
    assert mixed.metadata["weights"]["transformer"] == first
    assert (there["content"], back["content"]) == (second, first)
    assert 3 < there["step"] < back["step"] - 2 and back["step"] < 200
    await supervisor.reload(order(when="pin"))
    await supervisor.rollback("pin")  # serves the first, and has the second in memory
    accepted = await supervisor.submit(ask(tmp_path / "again.mp4", **fields))
    task = supervisor._pool.get(accepted.id)
    task.changes += msgspec.convert([there, back], list[WeightChange])
    await until(lambda: denoising(supervisor, there["step"] + 1), "a step after the change")
    pid = pid_of(supervisor, "dit")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    again = await supervisor.result(accepted.id)
    assert again.metadata["weight_changes"] == [there, back]
    assert again.metadata["weights"]["transformer"] == first
    frames = Video(again.path).sha256
    assert frames == Video(mixed.path).sha256
    assert frames != await video(supervisor, tmp_path / "v.mp4", **fields), "a change shows"
    await supervisor.reload(order())  # pins nothing


async def test_to_and_fro_between_two_steps_is_no_change(
    supervisor: Supervisor, golden: Golden, tmp_path: Path
) -> None:
    """`now` twice before the next step is granted: the request is computed with what it began with, and says so."""
    first, second = golden
    undisturbed = await video(supervisor, tmp_path / "v.mp4", steps=40)
    await supervisor.reload(order(when="pin"))
    await supervisor.rollback("pin")
    running = await supervisor.submit(ask(tmp_path / "v.mp4", steps=40))
    await until(lambda: denoising(supervisor, 3), "the third step")
    pid = pid_of(supervisor, "dit")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    changes = []
    for content in (second, first):
        assert (await supervisor.rollback("now")).weights == {"transformer": content}
        changes.append([change.content for change in supervisor._pool.get(running.id).changes])
    os.kill(pid, signal.SIGCONT)
    assert changes == [[second], []]
    done = await supervisor.result(running.id)
    assert "weight_changes" not in done.metadata and done.metadata["weights"]["transformer"] == first
    assert Video(done.path).sha256 == undisturbed
    await supervisor.reload(order())  # pins nothing


async def test_bad_checkpoints_change_nothing(supervisor: Supervisor, golden: Golden, tmp_path: Path) -> None:
    """Refused by what is wrong with them; memory and the next video are as before. (Every kind of damage:
    test_reload_mutations.py.)"""
    first, _ = golden
    before = supervisor.memory()
    tensors = load_file(SECOND / FILES["transformer"])
    name = "blocks.1.attn1.to_q.weight"
    damaged = {
        "missing": ({n: t for n, t in tensors.items() if n != name}, name),
        "nan": ({**tensors, name: tensors[name] * float("nan")}, name),
        "misshaped": ({**tensors, name: tensors[name][:1].clone()}, name),
        "int": ({**tensors, name: tensors[name].int()}, name),
    }
    for kind, (content, says) in damaged.items():
        shutil.copytree(SECOND, tmp_path / kind)
        save_file(content, tmp_path / kind / FILES["transformer"])
        with pytest.raises(BadCheckpoint, match=says):
            await supervisor.reload(order(tmp_path / kind))
    shutil.copytree(SECOND, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / FILES["transformer"], 1_000_000)
    with pytest.raises(BadCheckpoint, match=r"diffusion_pytorch_model.safetensors.*cut short"):
        await supervisor.reload(order(tmp_path / "cut"))
    assert supervisor.memory() == before
    assert await video(supervisor, tmp_path / "v.mp4") == golden[first]


async def test_a_directory_with_some_components_only(supervisor: Supervisor, tmp_path: Path) -> None:
    """The refusal says which there are; where there is nothing at all, it says nothing of that."""
    with pytest.raises(BadCheckpoint, match=r"lacks text_encoder/.*only what is there: --component transformer$"):
        await supervisor.reload(Reload(ref=0, checkpoint=str(SECOND)))
    with pytest.raises(BadCheckpoint, match="a directory without weights") as refused:
        await supervisor.reload(Reload(ref=0, checkpoint=str(tmp_path)))
    assert "--component" not in str(refused.value)


async def test_what_cannot_be_asked_for(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no unet"):
        await supervisor.reload(order(SECOND, "unet"))
    with pytest.raises(BadConfig):
        await supervisor.reload(order(tmp_path / "nowhere"))


async def test_a_dry_run_leaves_nothing(supervisor: Supervisor) -> None:
    """It says what would be new; versions, memory and descriptors are as before."""
    await supervisor.reload(order(dry_run=True))
    before = (supervisor.memory(), supervisor.versions(), len(os.listdir("/proc/self/fd")))
    done = await supervisor.reload(order(dry_run=True))
    assert done.dry_run and set(done.weights) == {"transformer"}
    assert (supervisor.memory(), supervisor.versions(), len(os.listdir("/proc/self/fd"))) == before


async def test_of_reloads_at_once_the_last_wins(supervisor: Supervisor, golden: Golden, tmp_path: Path) -> None:
    """Those before it are told, whether they are reading or wait for their turn; a dry run overtakes nobody."""
    other = vary(tmp_path / "other", 1)
    reading = asyncio.create_task(supervisor.reload(order(other, "transformer", "vae")))
    await until(lambda: bool(supervisor._reloader.loading), "the loader reads")
    waiting = asyncio.create_task(supervisor.reload(order(other)))
    await asyncio.sleep(0)  # it has come, and looks at its files
    done = await supervisor.reload(order())
    for overtaken in (reading, waiting):
        with pytest.raises(Superseded):
            await overtaken
    assert list(done.weights.values()) == [list(golden)[1]]
    reading = asyncio.create_task(supervisor.reload(order(FIRST)))
    await until(lambda: bool(supervisor._reloader.loading), "the loader reads")
    dry = await supervisor.reload(order(dry_run=True))
    assert dry.weights == done.weights
    assert list((await reading).weights.values()) == [next(iter(golden))]


async def test_the_last_to_come_wins_though_its_files_were_found_first(
    supervisor: Supervisor, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, found = vary(tmp_path / "other", 1), threading.Event()

    def find_slowly(model: ModelParams, params: SystemParams, directory: Path, names: Sequence[str]) -> object:
        if directory == other:
            found.wait(30)
        return open_components(model, params, directory, names)

    monkeypatch.setattr("engine.reload.open_components", find_slowly)
    slow = asyncio.create_task(supervisor.reload(order(other)))
    await asyncio.sleep(0)  # it has come
    done = await supervisor.reload(order())
    found.set()
    with pytest.raises(Superseded):
        await slow
    assert list(done.weights.values()) == [list(golden)[1]]
    assert {v.content for v in supervisor.versions() if v.state == "serving"} >= {list(golden)[1]}


def given(file: Path) -> dict[str, GivenTensor]:
    """The tensors of a file, as a program would give them."""
    arrays = {name: tensor.numpy() for name, tensor in load_file(file).items()}
    return {name: GivenTensor("F16", a.shape, np.ascontiguousarray(a).data) for name, a in arrays.items()}


async def test_weights_from_memory(supervisor: Supervisor, golden: Golden, tmp_path: Path) -> None:
    """They are the same version as the same tensors in a file, and make the same video; once their memory was let go
    of, nothing returns to them."""
    first, second = golden
    tensors = given(SECOND / FILES["transformer"])
    done = await supervisor.update_weights("transformer", tensors)
    assert done.weights == {"transformer": second}
    assert await video(supervisor, tmp_path / "v.mp4") == golden[second]
    (info,) = [v for v in supervisor.versions() if v.content == second]
    assert info.source == "given in memory"
    assert (await supervisor.reload(order())).unchanged == {"transformer": second}
    await supervisor.reload(order(FIRST))
    await until(lambda: placed(supervisor)["transformer"] == [first], "it is let go of")
    with pytest.raises(NotFound, match="given by a program"):
        await supervisor.rollback()
    await supervisor.update_weights("transformer", tensors)


async def test_weights_from_memory_are_verified(supervisor: Supervisor, golden: Golden, tmp_path: Path) -> None:
    first, _ = golden
    before = (supervisor.memory(), len(os.listdir("/proc/self/fd")))
    tensors = given(FIRST / FILES["vae"])
    name, tensor = next(iter(tensors.items()))
    nan = np.full(tensor.shape, np.nan, np.float16)
    wrong: list[tuple[str, dict[str, GivenTensor], str]] = [
        ("vae", {n: t for n, t in tensors.items() if n != name}, name),
        ("vae", {**tensors, "other": tensor}, "other"),
        ("vae", {**tensors, name: GivenTensor("F16", tensor.shape, nan.data)}, f"{name} .*finite"),
        ("vae", {**tensors, name: GivenTensor("F32", tensor.shape, tensor.data)}, f"{name} has .* bytes"),
        ("vae", {**tensors, name: GivenTensor("E7", tensor.shape, tensor.data)}, f"{name} has the dtype"),
        ("transformer", tensors, "not a Wan DiT"),
        ("unet", tensors, "has no unet"),
    ]
    for component, content, says in wrong:
        with pytest.raises((BadCheckpoint, BadConfig), match=says):
            await supervisor.update_weights(component, content)
    assert (supervisor.memory(), len(os.listdir("/proc/self/fd"))) == before
    assert await video(supervisor, tmp_path / "v.mp4") == golden[first]


async def test_the_loader_dies_while_it_waits_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever killed it, and though its end is not seen before it is asked for more: the next reload has another one
    read. One that dies before it has ever answered is not tried again."""
    async with engine() as supervisor:
        first = await video(supervisor, tmp_path / "v.mp4")
        await supervisor.reload(order())
        loader = supervisor._reloader._loader
        before = loader.pid
        assert before is not None
        monkeypatch.setattr("engine.loader._Process.lives", lambda process: True)
        os.kill(before, signal.SIGKILL)
        await supervisor.reload(order(FIRST))
        assert await video(supervisor, tmp_path / "v.mp4") == first
        assert loader.pid not in (None, before)
        monkeypatch.setattr("engine.loader.LOADER", "engine.nothing_of_this_name")
        loader.end()
        with pytest.raises(ServerUnavailable, match="was ended"):
            await supervisor.reload(order())


async def test_no_reload_while_the_engine_drains(tmp_path: Path) -> None:
    """An engine that finishes what it accepted serves nothing new; a reload under way ends with an error, and with it
    the loader."""
    async with Supervisor(SystemParams(model="wan-demo", device="cpu", placement="fused")) as supervisor:
        await supervisor.ready()
        with pytest.raises(NotFound, match="nothing was reloaded"):
            await supervisor.rollback()
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4", steps=20)))
        await until(lambda: denoising(supervisor, 1), "the first step")
        reloading = asyncio.create_task(supervisor.reload(order()))
        loader = supervisor._reloader._loader
        await until(lambda: loader.pid is not None, "the loader is there")
        assert loader.pid is not None
        os.kill(loader.pid, signal.SIGSTOP)  # else it may be done before the request is
        stopping = asyncio.create_task(supervisor.stop(drain=True))
        await asyncio.sleep(0)
        with pytest.raises(ServerUnavailable, match="stopping"):
            await supervisor.reload(order())
        await running
        await stopping
        with pytest.raises((ServerUnavailable, StageFailed)):
            await reloading
        assert loader.pid is None
