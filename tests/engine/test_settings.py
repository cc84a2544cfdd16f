"""Attention and threads of a stage change while requests run: by a process that has proved itself with them."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams
from engine.admission import admit
from engine.client import Client
from engine.models import load_model
from engine.settings import Change, Settings, changed
from engine.successor import successor
from engine.tasks import Task, computed_metadata, task_spec
from ipc.errors import BadConfig, StageFailed
from tests.conftest import Video, until
from tests.engine.test_replace import ask, denoising, pids
from tests.engine.wire import EngineProcess, run_engine, wait_for

SHORT = {"steps": 4, "num_frames": 5, "height": 32, "width": 32}
STEPS = 400
"""They take longer than it takes a process to prove itself, which is some seconds where it has to import torch."""


def computes(supervisor: Supervisor) -> dict[str, tuple[str, str]]:
    """Seat -> what attention it has, and how many threads."""
    found = {stage.name: stage.computes for stage in supervisor.status().stages}
    return {
        seat: (what.get("attention", "-").split()[0], what.get("threads", "-")) for seat, what in found.items()
    }  # fmt: skip


async def test_a_request_goes_on_with_other_settings(tmp_path: Path) -> None:
    """While one is denoised, the dit gets other attention and more threads, and then the vae more threads: the request
    ends, and says from which step on it was computed with what. The next one is what an engine gives that was started
    with all that, says only that, and so it stays when the dit dies."""
    async with Supervisor(SystemParams(device="cpu", attention_backend="math", threads=2)) as supervisor:
        wanted = Video((await supervisor.generate(ask(tmp_path / "fresh.mp4", **SHORT))).path).sha256
    async with Supervisor(SystemParams(device="cpu", threads=1)) as supervisor:
        await supervisor.ready()
        held = [(h.name, h.generation) for h in supervisor.memory()]
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4", **{**SHORT, "steps": STEPS})))
        await until(lambda: denoising(supervisor, 3), "the third step")
        await supervisor.replace_stages(["dit"], attention_backend="math", threads=2)
        assert computes(supervisor) == {
            "text": ("-", "1"), "dit": ("math", "2"), "vae": ("-", "1"), "writer": ("-", "-")
        }  # fmt: skip
        metadata = (await asyncio.wait_for(running, 240)).metadata
        assert metadata["versions"]["attention"].startswith("sdpa ")
        assert metadata["threads"] == {"text": 1, "dit": 1, "vae": 1}
        (change,) = metadata["compute_changes"]
        assert change["stage"] == "dit" and 3 <= change["step"] < STEPS
        assert change["now"].pop("attention").startswith("math ") and change["now"] == {"threads": "2"}
        await supervisor.replace_stages(["vae"], threads=2)
        dit = pids(supervisor)["dit"]
        assert dit is not None
        os.kill(dit, signal.SIGKILL)
        done = await supervisor.generate(ask(tmp_path / "v.mp4", **SHORT))
        assert Video(done.path).sha256 == wanted
        assert done.metadata["versions"]["attention"].startswith("math ")
        assert done.metadata["threads"] == {"text": 1, "dit": 2, "vae": 2}
        assert "compute_changes" not in done.metadata
        assert [(h.name, h.generation) for h in supervisor.memory()] == held
        assert not supervisor.check_integrity()


async def test_what_does_not_work_here(tmp_path: Path) -> None:
    """A backend that needs a GPU: the process that tries it says so, and the old one goes on as it was, also after a
    replacement without other settings."""
    async with Supervisor(SystemParams(device="cpu", threads=1, placement="fused")) as supervisor:
        await supervisor.ready()
        before = pids(supervisor), computes(supervisor)
        with pytest.raises(StageFailed, match="the old one goes on: attention_backend is cudnn, which does not work"):
            await supervisor.replace_stages(["dit"], attention_backend="cudnn", threads=2)
        assert (pids(supervisor), computes(supervisor)) == before
        await supervisor.replace_stages()
        assert computes(supervisor) == before[1]
        done = await supervisor.generate(ask(tmp_path / "v.mp4", **SHORT))
        assert done.metadata["threads"] == {"text": 1, "dit": 1, "vae": 1}


async def test_all_dits_change_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two dits, the process for the second is not fit: the first has not changed either, and the process that was is
    gone. With two that are fit, both change."""
    tried: list[Any] = []

    async def second_fails(*asked: Any) -> Any:
        if tried:
            raise StageFailed("it is not fit")
        tried.append(await successor(*asked))
        return tried[0]

    async with Supervisor(SystemParams(dit_devices=("cpu", "cpu"), threads=1)) as supervisor:
        await supervisor.ready()
        before = pids(supervisor), computes(supervisor)
        with monkeypatch.context() as patched:
            patched.setattr("engine.takeover.successor", second_fails)
            with pytest.raises(StageFailed, match="it is not fit"):
                await supervisor.replace_stages(["dit"], attention_backend="math")
        assert not tried[0].lives()
        assert (pids(supervisor), computes(supervisor)) == before
        await supervisor.replace_stages(["dit"], attention_backend="math")
        assert computes(supervisor)["dit"] == computes(supervisor)["dit:1"] == ("math", "1")


def test_the_command_line_and_the_next_program(short_dir: Path) -> None:
    """`engine reload --stage` changes them, `engine status` shows them, a change of programs keeps them; what cannot be
    is refused by name."""
    with EngineProcess(short_dir, "--threads", "1") as engine:
        engine.wait_ready()
        client = Client(engine.socket)

        def reload(*options: str) -> str:
            ran = run_engine("reload", "--socket", engine.socket, *options)
            return ran.stdout if ran.returncode == 0 else ran.stderr

        assert "dit: process" in reload("--stage", "dit", "--attention-backend", "math", "--threads", "2")
        client.reload_supervisor()
        dit = next(stage for stage in client.status().stages if stage.name == "dit")
        assert dit.computes["threads"] == "2" and dit.computes["attention"].startswith("math ")
        assert dit.pid is not None
        os.kill(dit.pid, signal.SIGKILL)
        wait_for(lambda: client.status().stages[1].pid not in (None, dit.pid), "a new process")
        wait_for(lambda: client.status().stages[1].state == "up", "the new process to be up")
        assert client.status().stages[1].computes == dit.computes
        shown = run_engine("status", "--socket", engine.socket).stdout
        assert "math (torch" in next(line for line in shown.splitlines() if line.startswith("dit"))
        for options, says in {
            ("--stage", "dit", "--attention-backend", "fast"): "attention_backend is 'fast'; it must be auto, ",
            ("--stage", "vae", "--attention-backend", "math"): "name the stage dit",
            ("--stage", "text", "--threads", "2"): "threads are of dit and vae",
            ("--stage", "dit", "--threads", "5000"): "threads is 5000; it must be from 0",
            ("--placement", "both"): "placement is 'both'; it must be split or fused",
            ("--placement", "fused", "--stage", "dit"): "name no stage",
            ("--placement", "fused", "--supervisor"): "say what to reload",
            ("--supervisor", "--threads", "2"): "say which, with --stage NAME or --all",
        }.items():
            assert says in reload(*options)
        assert client.status().stages[1].computes == dit.computes


def test_what_is_changed() -> None:
    """Only what is named, of the stages that have it; 0 threads are the default; without stages, all."""
    before = Settings(attention="auto", threads={"text": 1, "dit": 1, "vae": 2, "writer": 1})
    default: Any = {"text": 1, "dit": 4, "vae": 8, "writer": 1}
    assert changed(before, Change(), default) == before
    assert changed(before, Change(["dit"], "math", 3), default) == Settings(
        attention="math", threads={"text": 1, "dit": 3, "vae": 2, "writer": 1}
    )
    assert changed(before, Change(threads=0), default).threads == default
    assert changed(before, Change(["text", "vae"], threads=5), default).threads == {**before.threads, "vae": 5}
    assert changed(before, Change(["writer", "vae", "dit", "text"], placement="fused"), default) == before
    with pytest.raises(BadConfig, match="threads is -1"):
        changed(before, Change(["dit"], threads=-1), default)
    with pytest.raises(BadConfig, match=r"placement is which stages share a process, .*; name no stage"):
        changed(before, Change(["dit", "vae"], placement="fused"), default)


def test_more_threads_than_cores(caplog: pytest.LogCaptureFixture) -> None:
    """A warning that says how many cores there are; for as many as there are, none."""
    before = Settings(attention="auto", threads={"text": 1, "dit": 1, "vae": 2, "writer": 1})
    cores = len(os.sched_getaffinity(0))
    assert changed(before, Change(["dit"], threads=cores), before.threads).threads["dit"] == cores
    assert not caplog.records
    assert changed(before, Change(["dit"], threads=cores + 1), before.threads).threads["dit"] == cores + 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"threads is {cores + 1}, but the engine may use {cores} core" in record.getMessage()


def test_what_the_metadata_says(tmp_path: Path) -> None:
    """Of quanta that are done again, by another process, only the last counts; what the first one was computed with is
    what the task was, whatever the processes are now."""
    model = load_model("wan-demo")
    job = admit(ask(tmp_path / "v.mp4"), model, SystemParams())
    task = Task(job, task_spec(job, model, 0, None, False), {}, 0.0)
    old, new = {"torch": "2.11", "threads": "1"}, {"torch": "2.13", "threads": "1"}
    assert [task.note_computed("denoise", 0, old), task.note_computed("denoise", 1, old)] == [False, False]
    assert task.note_computed("denoise", 2, new)
    assert not task.note_computed("denoise", 3, new)
    assert not task.note_computed("decode", 0, old)
    assert task.note_computed("decode", 1, new)
    assert computed_metadata(task, {"torch": "3", "av": "17"}) == {
        "versions": {"torch": "2.11", "av": "17"},
        "threads": {"dit": 1, "vae": 1},
        "compute_changes": [
            {"stage": "dit", "step": 2, "now": {"torch": "2.13"}}, {"stage": "vae", "step": 1, "now": {"torch": "2.13"}}
        ],
    }  # fmt: skip
    assert not task.note_computed("decode", 0, new)  # the writer died: from the start
    assert len(computed_metadata(task, {})["compute_changes"]) == 1
