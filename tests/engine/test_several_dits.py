"""Several dits on one queue, with the model that ships: real processes, of which some are killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import Supervisor, SystemParams, UserParams, devices, process
from engine.devices import resolve_devices
from engine.memory import ROUTES, EngineMemory, capacity, slot_sizes
from engine.models import CONFIGS, load_model, read_yaml
from ipc.errors import BadConfig
from ipc.messages.client import Reload
from ipc.messages.names import Seat
from ipc.messages.status import StageStatus
from tests.conftest import Video

Wait = Callable[..., Awaitable[None]]

ONE = SystemParams(device="cpu", threads=1)
TWO = SystemParams(dit_devices=("cpu", "cpu"), threads=1)
STEPS = 10


def ask(path: Path, seed: int = 3) -> UserParams:
    prompt = "a red circle moves left on a black background"
    return UserParams(prompt=prompt, seed=seed, steps=STEPS, output=str(path))


def at(supervisor: Supervisor, seat: Seat) -> StageStatus:
    return next(stage for stage in supervisor.status().stages if stage.name == seat)


def kill(supervisor: Supervisor, seat: Seat) -> int:
    """SIGKILL of the process at this seat; its pid."""
    pid = at(supervisor, seat).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def commits(supervisor: Supervisor) -> int:
    """Denoising steps that were computed and committed by any dit; no report of a stage says so."""
    return supervisor._memory.state.statistics().commits


def clean(supervisor: Supervisor) -> bool:
    """No slot held, accounts in order."""
    depths = [queue.depth for queue in supervisor.status().queues] + [supervisor._memory.state.statistics().depth]
    return not supervisor.check_integrity() and not any(depths)


def placed(pid: int | None) -> set[str]:
    """The memfds with a transformer's weights that a process has mapped, by inode."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:transformer" in line}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The frames of a request on an engine with one dit that nobody disturbs, as their SHA-256."""
    path = tmp_path_factory.mktemp("calm") / "v.mp4"

    async def generate() -> None:
        async with Supervisor(ONE) as supervisor:
            await supervisor.generate(ask(path))

    asyncio.run(generate())
    return Video(path).sha256


async def test_two_dits_share_the_work_and_the_weights(tmp_path: Path, calm: str, wait_until: Wait) -> None:
    """Four requests on two dits: both compute, each from the same placed weights, and the frames are those of one dit.
    Every seat is in the status."""
    async with Supervisor(TWO) as supervisor:
        await supervisor.ready()
        await asyncio.gather(*(supervisor.generate(ask(tmp_path / f"{seed}.mp4", seed)) for seed in range(4)))
        stages = {stage.name: stage for stage in supervisor.status().stages}
        weights = [placed(stages[seat].pid) for seat in ("dit", "dit:1")]
        await wait_until(lambda: clean(supervisor), "giving every slot back")
    assert list(stages) == ["text", "dit", "dit:1", "vae", "writer"]
    assert all(stages[seat].state == "up" and stages[seat].device == "cpu" for seat in ("dit", "dit:1"))
    assert stages["dit"].quanta + stages["dit:1"].quanta == 4 * STEPS
    assert min(stages["dit"].quanta, stages["dit:1"].quanta) >= STEPS
    assert weights[0] == weights[1] and len(weights[0]) == 1
    assert Video(tmp_path / "3.mp4").sha256 == calm


async def test_a_killed_dit_hands_its_task_to_the_other(tmp_path: Path, calm: str, wait_until: Wait) -> None:
    """SIGKILL of the dit that denoises the only request, in the middle: the other one goes on at the step that was
    reported last, no step that was committed is computed again, and the frames are as undisturbed. When the killed one
    is back, both serve."""
    async with Supervisor(TWO) as supervisor:
        await supervisor.ready()
        task = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
        await wait_until(lambda: any(t.phase == "denoise" and t.step >= 4 for t in supervisor.tasks()), "denoising")
        seats: tuple[Seat, Seat] = ("dit", "dit:1")
        busy, other = seats if at(supervisor, "dit").quanta else seats[::-1]
        assert at(supervisor, other).quanta == 0
        pid = kill(supervisor, busy)
        await asyncio.wait_for(task, 120)
        done = {seat: at(supervisor, seat).quanta for seat in seats}
        assert done[busy] >= 4 and done[other] == STEPS - done[busy] > 0
        assert commits(supervisor) == STEPS
        await wait_until(lambda: at(supervisor, busy).state == "up", "the restart")
        assert at(supervisor, busy).pid != pid
        await asyncio.gather(*(supervisor.generate(ask(tmp_path / f"{seed}.mp4", seed)) for seed in range(2)))
        assert all(at(supervisor, seat).quanta > done[seat] for seat in seats)
        await wait_until(lambda: clean(supervisor), "giving every slot back")
    assert Video(tmp_path / "v.mp4").sha256 == calm


async def test_a_failed_dit_leaves_the_other_serving(tmp_path: Path, wait_until: Wait) -> None:
    """One dit dies at every start until it is FAILED; a request that comes meanwhile, and one that comes then, are
    done by the other. `ready` does not wait for the FAILED one."""
    async with Supervisor(TWO) as supervisor:
        await supervisor.ready()
        task = asyncio.create_task(supervisor.generate(ask(tmp_path / "meanwhile.mp4")))
        killed: int | None = kill(supervisor, "dit:1")
        while killed is not None:
            await wait_until(partial(is_decided, supervisor, "dit:1", killed), "the next start, or the end of them")
            killed = kill(supervisor, "dit:1") if at(supervisor, "dit:1").pid is not None else None
        assert at(supervisor, "dit:1").state == "failed"
        await task
        await supervisor.ready()
        before = at(supervisor, "dit").quanta
        await supervisor.generate(ask(tmp_path / "then.mp4"))
        assert at(supervisor, "dit").quanta == before + STEPS
        assert at(supervisor, "dit:1").state == "failed"
        await wait_until(lambda: clean(supervisor), "giving every slot back")


def is_decided(supervisor: Supervisor, seat: Seat, killed: int) -> bool:
    """After a death: another process is started, or none ever."""
    now = at(supervisor, seat)
    return now.pid not in (None, killed) or now.state == "failed"


async def test_a_dit_that_dies_while_it_loads_is_replaced_by_its_sibling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """The dit that reads the weights, a fresh interpreter, is killed before it has placed them: the other reads them
    instead, and both are up in the end, with the same weights."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.unforkable_worker")
    async with Supervisor(TWO) as supervisor:
        await wait_until(lambda: at(supervisor, "dit").pid is not None, "a dit that reads")
        assert at(supervisor, "dit:1").pid is None
        kill(supervisor, "dit")
        await supervisor.ready()
        assert placed(at(supervisor, "dit").pid) == placed(at(supervisor, "dit:1").pid) != set()
        await supervisor.generate(ask(tmp_path / "v.mp4"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dit_devices": ("cpu", "cpu"), "placement": "fused"}, "use placement split, or leave dit_devices out"),
        ({"dit_devices": ("cuda:0", "cuda")}, "dit_devices names cuda:0 twice"),
        ({"dit_devices": ("cpu", "cuda:1")}, "name devices of one kind"),
        ({"dit_devices": ("cuda:0", "cuda:1"), "device": "cpu"}, "name devices of one kind"),
        ({"dit_devices": ("cuda:2",)}, "CUDA shows 2 devices"),
        ({"dit_devices": ("gpu",)}, "it must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], says: str) -> None:
    """On a machine with two GPUs: `BadConfig` says what to change."""
    monkeypatch.setattr(devices, "visible_devices", lambda: ("one", "two"))
    with pytest.raises(BadConfig, match=says):
        resolve_devices(SystemParams(**fields))


def test_devices_of_a_machine_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and vae are on `device`, which is the first of the dits' if nothing is said; without `dit_devices` there is
    one dit, on `device`."""
    monkeypatch.setattr(devices, "visible_devices", lambda: ("one", "two"))
    assert resolve_devices(SystemParams()) == ("cuda:0", ("cuda:0",))
    assert resolve_devices(SystemParams(dit_devices=("cuda:1", "cuda:0"))) == ("cuda:1", ("cuda:1", "cuda:0"))
    assert resolve_devices(SystemParams(dit_devices=("cuda:1",), device="cuda:0")) == ("cuda:0", ("cuda:1",))
    assert resolve_devices(read_yaml(CONFIGS / "system" / "two-dits.yaml", SystemParams)) == ("cpu", ("cpu", "cpu"))


@pytest.mark.parametrize("dits", [1, 2, 3])
def test_every_dit_has_room_for_what_the_scheduler_may_grant(dits: int) -> None:
    """Each dit's part of the latents, and all other slots together, are as many as the scheduler's bounds."""
    model = load_model("wan-demo")
    bounds = capacity(dict.fromkeys(["text", "dit", *(f"dit:{n}" for n in range(1, dits)), "vae", "writer"]))
    queues, (states, _) = slot_sizes(model, dits=dits)
    assert queues["latents"][0] == dits * bounds.latents and bounds.latents > dits
    assert queues["prompts"][0] == 2 * bounds.prompts and bounds.prompts >= bounds.states + 2
    assert queues["init_latents"][0] == bounds.init_latents
    assert states == bounds.states == 2 * dits
    memory = EngineMemory(model, dits=dits)
    try:
        specs = {spec.name: spec for spec in memory.specs(("text", "dit", "vae", "writer"))}
        assert [specs[name].producers for name in ROUTES] == [1, 1, dits, 1]
        assert [specs[name].consumers for name in ROUTES] == [dits, dits, 1, 1]
        assert memory.state.spec.shared == (dits > 1)
    finally:
        memory.close()


async def test_weights_change_under_two_requests(tmp_path: Path, wait_until: Wait) -> None:
    """`now`, while each dit denoises: both requests say at which step they changed, and after that both dits make what
    one makes with the new weights."""
    second = str(CONFIGS / "demo" / "revision-2")
    order = Reload(ref=0, checkpoint=second, components=["transformer"], when="pin")
    async with Supervisor(ONE) as supervisor:
        await supervisor.reload(order)
        wanted = Video((await supervisor.generate(ask(tmp_path / "v.mp4"))).path).sha256
    async with Supervisor(TWO) as supervisor:
        await supervisor.ready()
        before = supervisor.status().weights
        (content,) = (await supervisor.reload(order)).weights.values()
        await supervisor.rollback("pin")
        long = {"steps": 60, "num_frames": 5, "height": 48, "width": 48}
        requests = [msgspec.structs.replace(ask(tmp_path / f"{n}.mp4"), **long) for n in range(2)]
        accepted = [await supervisor.submit(request) for request in requests]
        await wait_until(lambda: all(t.phase == "denoise" and t.step > 2 for t in supervisor.tasks()), "both denoise")
        assert (await supervisor.rollback("now")).weights == {"transformer": content}
        for task in accepted:
            metadata = (await supervisor.result(task.id)).metadata
            (change,) = metadata["weight_changes"]
            assert metadata["weights"] == before and change["content"] == content and 2 < change["step"] < 60
        quanta = {seat: at(supervisor, seat).quanta for seat in ("dit", "dit:1")}
        new = await asyncio.gather(*(supervisor.generate(ask(tmp_path / f"new-{n}.mp4")) for n in range(4)))
        assert {Video(done.path).sha256 for done in new} == {wanted}
        assert all(at(supervisor, seat).quanta > earlier for seat, earlier in quanta.items()), "both have computed"
        await wait_until(lambda: clean(supervisor), "nothing is held")
