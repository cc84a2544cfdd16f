"""LoRA adapters that requests name, on the whole engine: what comes out is what a fresh start with the same files
merged makes, to the bit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine import Supervisor, SystemParams
from ipc.errors import BadCheckpoint, BadConfig, BadRequest, NotFound
from ipc.messages.status import LoraInfo
from tests.conftest import Video, until
from tests.engine.adapters import COMBINATIONS, ask, fresh_start, write_adapter, write_files


@asynccontextmanager
async def engine(**fields: Any) -> AsyncIterator[Supervisor]:
    async with Supervisor(SystemParams(**{"placement": "fused", "device": "cpu", **fields})) as supervisor:
        await supervisor.ready()
        yield supervisor
        await until(lambda: len(supervisor._scheduler) == 0, "the last drop")
        assert supervisor.check_integrity() == []


async def sha256(supervisor: Supervisor, path: Path, *loras: str, **fields: Any) -> str:
    return Video((await supervisor.generate(ask(path, *loras, **fields))).path).sha256


def denoising(supervisor: Supervisor, step: int) -> bool:
    return any(t.state == "running" and t.phase == "denoise" and t.step >= step for t in supervisor.tasks())


def adapter_memory(supervisor: Supervisor) -> list[str]:
    return [held.generation for held in supervisor.memory() if held.name.startswith("LoRA")]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """What a fresh start with each combination makes."""
    directory = tmp_path_factory.mktemp("fresh")
    found = {wanted: asyncio.run(fresh_start(directory, wanted)) for wanted in COMBINATIONS}
    assert len(set(found.values())) == len(COMBINATIONS)
    return found


async def test_switching_is_a_fresh_start(tmp_path: Path, golden: dict[tuple[str, ...], str]) -> None:
    """A, B of another rank, none, both, some at strength 0: each as an engine that was started with just that; and
    again afterwards. The metadata names what was used."""
    async with engine() as supervisor:
        found = {name: await supervisor.add_lora(name, str(file)) for name, file in write_files(tmp_path).items()}
        assert [found[name].rank for name in "abc"] == [4, 1, 2]
        for wanted in [("a:1",), ("b:1",), (), ("a:0.5", "b:-1"), ("a:0", "b:0"), ("a:1",), ()]:
            same = tuple(text for text in wanted if not text.endswith(":0"))
            assert await sha256(supervisor, tmp_path / "v.mp4", *wanted) == golden[same], wanted
        done = await supervisor.generate(ask(tmp_path / "v.mp4", "b:-1", "a"))
        assert done.metadata["adapters"] == [
            {"name": name, "strength": strength, "content": found[name].content}
            for name, strength in (("b", -1.0), ("a", 1.0))
        ]
        assert done.metadata["parameters"]["lora"] == ["b:-1", "a:1"]
        inside = Video(done.path).metadata["comment"]
        assert json.loads(inside)["adapters"] == done.metadata["adapters"]
        plain = await supervisor.generate(ask(tmp_path / "v.mp4"))
        assert "adapters" not in plain.metadata


async def test_a_request_keeps_what_it_was_accepted_with(tmp_path: Path) -> None:
    """Neither a removal nor another adapter of the name, nor other bytes in the file, change accepted requests; the
    memory is let go when the last of them is done."""
    first, second = (write_adapter(tmp_path / f"{seed}.safetensors", seed, 2) for seed in (1, 2))
    async with engine() as supervisor:
        await supervisor.add_lora("x", str(first))
        golden = await sha256(supervisor, tmp_path / "g.mp4", "x", steps=40)
        accepted = [await supervisor.submit(ask(tmp_path / f"{n}.mp4", "x", steps=40)) for n in range(2)]
        await until(lambda: denoising(supervisor, 2), "the second step")
        pid = supervisor.status().stages[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        write_adapter(first, 7, 3)
        await supervisor.add_lora("x", str(second))
        now, before = supervisor.loras()
        assert (now.name, now.state, now.running) == ("x", "loaded", 0)
        assert (before.name, before.state, before.running, before.files) == ("x", "draining", 2, ["1.safetensors"])
        assert len(adapter_memory(supervisor)) == 2
        await supervisor.remove_lora("x")
        with pytest.raises(BadRequest, match="none is loaded"):
            await supervisor.submit(ask(tmp_path / "late.mp4", "x"))
        assert adapter_memory(supervisor) == [before.content["transformer"]]
        os.kill(pid, signal.SIGCONT)
        for task in accepted:
            assert Video((await supervisor.result(task.id)).path).sha256 == golden
        await until(lambda: not adapter_memory(supervisor), "the last adapter is let go")
        assert supervisor.loras() == []
        await supervisor.add_lora("x", str(second))
        assert await sha256(supervisor, tmp_path / "new.mp4", "x", steps=40) != golden


async def test_a_killed_dit_goes_on_with_the_adapters(tmp_path: Path) -> None:
    """Also when their name is gone."""
    file = write_adapter(tmp_path / "a.safetensors", 1, 4)
    async with engine() as supervisor:
        await supervisor.add_lora("a", str(file))
        golden = await sha256(supervisor, tmp_path / "golden.mp4", "a", steps=60)
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "killed.mp4", "a", steps=60)))
        await until(lambda: denoising(supervisor, 3), "the third step")
        (dit,) = [stage for stage in supervisor.status().stages if stage.name == "dit"]
        assert dit.pid is not None
        await supervisor.remove_lora("a")
        os.kill(dit.pid, signal.SIGKILL)
        done = await running
        assert Video(done.path).sha256 == golden
        assert [stage.restarts for stage in supervisor.status().stages if stage.name == "dit"] == [1]


async def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    """Errors that name what is wrong; before acceptance, and without a change."""
    file = write_adapter(tmp_path / "a.safetensors", 1, 2)
    stranger = write_adapter(tmp_path / "stranger.safetensors", 1, 2, [77])
    broken = write_adapter(tmp_path / "nan.safetensors", 1, 2, size=float("nan"))
    async with engine() as supervisor:
        await supervisor.add_lora("a", str(file))
        before = supervisor.loras()
        refused: list[tuple[type[Exception], str, str, tuple[Path, ...]]] = [
            (BadCheckpoint, r"blocks\.77\.self_attn\.q\.lora_A\.weight", "s", (stranger,)),
            (BadCheckpoint, "not finite", "a", (broken,)),
            (BadConfig, "one transformer", "a", (file, file)),
            (BadConfig, "got 0 files", "a", ()),
            (BadConfig, "NUL", "a", (Path("a\0.safetensors"),)),
            (BadConfig, "LoRA name", "a:1", (file,)),
            (BadConfig, "LoRA name", "a.safetensors", (file,)),
        ]
        for kind, words, name, files in refused:
            with pytest.raises(kind, match=words) as raised:
                await supervisor.add_lora(name, *map(str, files))
            assert str(tmp_path) not in str(raised.value)
        assert supervisor.loras() == before
        for texts, words in {
            ("b",): "no LoRA has the name 'b'; loaded are a",
            ("a:strong",): "'strong' is not a strength",
            ("a:11",): "from -10 to 10",
            ("a:nan",): "from -10 to 10",
            ("a:1", "a:0.5"): "asked for twice",
            (f"{file}:1",): "no LoRA has the name",
        }.items():
            with pytest.raises(BadRequest, match=words):
                await supervisor.submit(ask(tmp_path / "v.mp4", *texts))
        with pytest.raises(NotFound, match="'b'"):
            await supervisor.remove_lora("b")
        assert supervisor.tasks() == []


async def test_a_hundred_random_adds_removes_and_requests(
    tmp_path: Path, golden: dict[tuple[str, ...], str], dice: Random
) -> None:
    """Against fresh starts: whatever happened before, and while other requests run, a request gives what an engine
    that was started with its files gives."""
    files = write_files(tmp_path)
    names: dict[str, str] = {}
    """Name in the engine -> which of the files it stands for."""
    running: list[tuple[str, str]] = []
    accepted: list[tuple[str, ...]] = []
    kinds = ["add"] * 20 + ["remove"] * 10 + ["request"] * 70
    dice.shuffle(kinds)

    async def settle(supervisor: Supervisor, most: int) -> None:
        while len(running) > most:
            identity, wanted = running.pop(0)
            assert Video((await supervisor.result(identity)).path).sha256 == wanted

    async with engine() as supervisor:
        for number, what in enumerate(kinds):
            name = dice.choice("xyz")
            if what == "add":
                names[name] = dice.choice(list(files))
                await supervisor.add_lora(name, str(files[names[name]]))
            elif what == "remove":
                known = names.pop(name, None) is not None
                try:
                    await supervisor.remove_lora(name)
                    assert known
                except NotFound:
                    assert not known
            else:
                of = {file: name for name, file in names.items()}
                possible = [wanted for wanted in COMBINATIONS if all(text[0] in of for text in wanted)]
                combination = dice.choice(dice.choice((possible[1:] or possible, COMBINATIONS)))
                texts = [of.get(text[0], "unknown") + text[1:] for text in combination]
                request = ask(tmp_path / f"{number}.mp4", *texts)
                if combination not in possible:
                    with pytest.raises(BadRequest, match="no LoRA has the name 'unknown'"):
                        await supervisor.submit(request)
                else:
                    accepted.append(combination)
                    running.append(((await supervisor.submit(request)).id, golden[combination]))
                    await settle(supervisor, 3)
        await settle(supervisor, 0)
        await until(lambda: len(adapter_memory(supervisor)) == len(set(names.values())), "memory of removed adapters")
        assert {info.name for info in supervisor.loras()} == set(names)
    assert len(accepted) >= 30 and sum(map(bool, accepted)) >= 15


def test_infos_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from engine.display.changes import print_loras

    info = LoraInfo(
        name="style", state="draining", files=["h.safetensors", "l.safetensors"], rank=16, tensors=480, bytes=2**20,
        content={"transformer": "a" * 32, "transformer_2": "b" * 32}, running=2,
    )  # fmt: skip
    print_loras([info])
    line = capsys.readouterr().out.splitlines()[-1]
    for word in (
        "style",
        "draining",
        "h.safetensors, l.safetensors",
        f"transformer {'a' * 12}",
        "16",
        "480",
        "1.0 MB",
    ):
        assert word in line
