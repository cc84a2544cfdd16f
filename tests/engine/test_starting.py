"""What each device begins with."""

from __future__ import annotations

import pytest

from engine.footprint import Setting, need, usual_size
from engine.host_samples import HostSample
from engine.models import load_model
from engine.monitor import SLACK, Sample
from engine.params import SystemParams, bytes_of
from engine.serve import system_params
from engine.starting import check_level, exact_plan, fitting, plans_at_start, settings_of, warn_of_host_memory
from ipc.errors import BadConfig
from ipc.messages.memory import MemoryPlan

MODEL = load_model("wan2.1-t2v-14b")
LAYERS = MODEL.transformer.num_layers
SETTING = Setting(queues=False)
GPU = 80 << 30


def needed(plan: MemoryPlan) -> int:
    return need(MODEL, usual_size(MODEL), plan, SETTING).gpu


def sample(free: int, host: int = 1 << 40) -> Sample:
    return Sample(at=0.0, total=GPU, free=free, host_available=host)


@pytest.mark.parametrize(
    ("plan", "host"),
    [(MemoryPlan(), 0), (MemoryPlan(level=2), 1 << 40), (MemoryPlan(level=3, blocks=20), 1 << 40)],
)
def test_the_lowest_level_that_fits_into_what_is_free(plan: MemoryPlan, host: int) -> None:
    """Just as much as the plan takes is free, beside what is left alone: it is taken; with a byte less, the next."""
    free = needed(plan) + int(GPU * SLACK)
    assert fitting(MODEL, sample(free), None, SETTING) == plan
    below = fitting(MODEL, sample(free - 1), None, SETTING)
    assert (below.level, -(below.blocks or 0)) > (plan.level, -(plan.blocks or 0))


def test_a_budget_counts_where_more_is_free() -> None:
    """80 GB are free: what fits into the budget is taken; without a budget, everything is resident."""
    budget = bytes_of("24GiB")
    plan = fitting(MODEL, sample(GPU), budget, SETTING)
    assert plan.level == 3 and needed(plan) <= budget
    assert fitting(MODEL, sample(GPU), None, SETTING) == MemoryPlan()


def test_where_nothing_fits() -> None:
    """What takes the least of the GPU, for requests that are smaller; without host memory for the weights, level 1."""
    assert fitting(MODEL, sample(1 << 30), None, SETTING) == MemoryPlan(level=3, blocks=0)
    assert fitting(MODEL, sample(1 << 30, host=1 << 30), None, SETTING) == MemoryPlan(level=1)


def test_a_driver_that_says_nothing() -> None:
    """The engine starts as if there were room, unless a budget says that there is not."""
    silent = Sample(at=0.0)
    assert fitting(MODEL, silent, None, SETTING) == MemoryPlan()
    assert fitting(MODEL, silent, bytes_of("8GiB"), SETTING).level == 3


def test_on_a_cpu() -> None:
    """auto is 0; a level that is asked for is that level; a budget is refused."""
    for wanted, plan in (("auto", MemoryPlan()), (3, MemoryPlan(level=3, blocks=0)), (1, MemoryPlan(level=1))):
        params = SystemParams(device="cpu", memory_level=wanted)  # type: ignore[arg-type]
        assert plans_at_start(params, MODEL, settings_of(params, "cpu", ("cpu",), False)) == {"cpu": plan}
    with pytest.raises(BadConfig, match="computes on the CPU; leave it out"):
        check_level(SystemParams(gpu_budget="8GiB"), "cpu")


def test_a_level_that_host_memory_has_no_room_for(caplog: pytest.LogCaptureFixture) -> None:
    """The operator's level holds, and the log says what will be lacking; not below level 2, nor where there is room."""
    for level, available, said in ((2, 30 << 30, True), (3, 30 << 30, True), (1, 30 << 30, False), (3, 1 << 40, False)):
        caplog.clear()
        host = HostSample(total=None, available=available, memlock=None, pressure=None)
        warn_of_host_memory(MODEL, host, exact_plan(MemoryPlan(level=level), MODEL), SETTING)
        assert [f"memory level {level} keeps the weights in host memory, and " in t for t in caplog.messages] == [
            True
        ] * said
    params = SystemParams(device="cuda:0", memory_level=3)
    assert plans_at_start(params, MODEL, {"cuda:0": SETTING}) == {"cuda:0": MemoryPlan(level=3, blocks=0)}


def test_a_budget_and_a_level_contradict_each_other() -> None:
    with pytest.raises(BadConfig, match="so give one of them"):
        check_level(SystemParams(gpu_budget="8GiB", memory_level=2), "cuda:0")


def test_what_each_device_has() -> None:
    """Two dits on two GPUs: the first device has three processes and the spare, the second has a dit; queues are on a
    GPU that all share."""
    params = SystemParams(warm_spare=True)
    found = settings_of(params, "cuda:0", ("cuda:0", "cuda:1"), False)
    assert found["cuda:0"] == Setting(processes=4, queues=False, stages=("text", "dit", "vae"))
    assert found["cuda:1"] == Setting(processes=1, queues=False, stages=("dit",))
    fused = settings_of(SystemParams(placement="fused"), "cuda:0", ("cuda:0",), True)
    assert fused == {"cuda:0": Setting(processes=1, queues=True, stages=("text", "dit", "vae"))}


def test_a_plan_is_written_in_one_way() -> None:
    """Blocks are of level 3 only, and no more than the model has."""
    assert exact_plan(MemoryPlan(level=2, blocks=7), MODEL) == MemoryPlan(level=2)
    assert exact_plan(MemoryPlan(level=3), MODEL) == MemoryPlan(level=3, blocks=0)
    assert exact_plan(MemoryPlan(level=3, blocks=1000), MODEL) == MemoryPlan(level=3, blocks=LAYERS)


@pytest.mark.parametrize("given", ["8", "GiB", "-1GiB", "8 TB", "8,5GiB"])
def test_what_is_no_budget(given: str) -> None:
    with pytest.raises(BadConfig, match="it must be a number of MB, GB, MiB, GiB, such as 8GiB"):
        check_level(SystemParams(gpu_budget=given), "cuda:0")


def test_budgets() -> None:
    assert [bytes_of(text) for text in ("8GiB", "7.5 GB", "512MiB", "3 MB")] == [
        8 << 30, 7_500_000_000, 512 << 20, 3_000_000
    ]  # fmt: skip
    assert system_params(None, {"gpu_budget": "24 GiB", "memory_level": "auto"}).gpu_budget == "24 GiB"
