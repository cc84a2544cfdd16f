"""Who has what of the memory that outlives the stages: `engine status --memory`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine import Client, Supervisor, SystemParams, UserParams
from ipc.messages.status import Holding
from tests.engine.wire import EngineProcess, run_engine

Wait = Callable[..., Awaitable[None]]


def named(held: list[Holding], name: str) -> list[Holding]:
    return [h for h in held if h.name == name]


async def test_what_is_held_in_the_middle_of_a_request(tmp_path: Path, wait_until: Wait) -> None:
    """While it denoises: the weights with their hashes, the two prompts in the hands of the dit's process, and the
    state with its owner and commits, all of the one task; no process has mapped memory with a name. Afterwards the
    weights alone."""
    async with Supervisor(SystemParams()) as supervisor:
        request = UserParams(prompt="a red circle", steps=400, output=str(tmp_path / "v.mp4"))
        task = asyncio.create_task(supervisor.generate(request))
        await wait_until(lambda: any(t.step >= 3 for t in supervisor.tasks() if t.phase == "denoise"), "denoising")
        held, (info,) = supervisor.memory(), supervisor.tasks()
        epoch = next(stage.epoch for stage in supervisor.status().stages if stage.name == "dit")
        weights = {h.name: h.generation for h in held if h.state == "placed"}
        prompts, (state,) = named(held, "prompts"), named(held, "states")
        assert [(h.state, h.task, h.sequence, h.reader) for h in prompts] == [
            ("reading", info.id, 0, epoch), ("reading", info.id, 1, epoch),
        ]  # fmt: skip
        assert (state.task, state.writer, state.where) == (info.id, epoch, "host")
        assert int(state.generation) >= 3
        pids = [stage.pid for stage in supervisor.status().stages] + [os.getpid(), supervisor.status().forks_pid]
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids if pid is not None)
        assert "/memfd:state" in maps and "/dev/" + "shm" not in maps and "/SYSV" not in maps
        assert state.bytes > 16 * 5 * 12 * 12 * 4, "latents and the solver's history"
        await supervisor.cancel(info.id)
        await asyncio.gather(task, return_exceptions=True)
        await wait_until(lambda: all(h.state == "placed" for h in supervisor.memory()), "the slots to be free")
        assert {h.name: h.generation for h in supervisor.memory()} == weights
        assert set(weights) == {"text_encoder", "transformer", "vae"}


def test_the_command(short_dir: Path) -> None:
    """A line for each component that is placed; the same as JSON and from the client."""
    with EngineProcess(short_dir) as engine:
        engine.wait_ready()
        lines = run_engine("status", "--memory", "--socket", engine.socket).stdout.splitlines()
        held = Client(engine.socket).memory()
        assert len(lines) == 1 + len(held) == 4
        assert all(h.name in line and h.generation[:12] in line for h, line in zip(held, lines[1:], strict=True))
        assert '"generation"' in run_engine("status", "--memory", "--json", "--socket", engine.socket).stdout
        assert "weights and states outlive the stages in host memory" in run_engine(
            "status", "--socket", engine.socket
        ).stdout  # fmt: skip
