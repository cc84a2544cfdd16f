"""Weights in host memory that come to the device as they are needed: the same bits at every level, whatever changes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.weight_sizes import transformer_bytes
from hotreload.placement import lay_out
from ipc.errors import OutOfMemory
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.stage import Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import slot_tensor
from stages import weights
from stages.dit import EXPERTS, DitStage
from stages.lanes import HostLane, Lane, Mark, Pair, lane_of
from stages.media import read_frames
from stages.models.text_encoder import build as build_text_encoder
from stages.models.transformer import WanTransformer
from stages.models.walks import WalkedModule
from stages.offload import ALIGNMENT, Offload, Pools, layout_of, source_of
from stages.stage import AnyNetwork, Stage
from stages.text import TextStage
from stages.weights import runs_of, shapes_of
from tests.stages.rig import CHANNELS, TWO_EXPERTS, Rig, finish, is_empty, make_checkpoint, make_job, quanta
from tests.stages.test_dit import denoise, image_job, put_image, put_prompts, step, take_latents
from tests.stages.test_dit_loras import Pair as Adapters

LAYERS = 7
MODEL = msgspec.structs.replace(
    TWO_EXPERTS,
    transformer=msgspec.structs.replace(TWO_EXPERTS.transformer, num_layers=LAYERS),
    text_encoder=msgspec.structs.replace(TWO_EXPERTS.text_encoder, num_layers=3),
)
PLANS = [MemoryPlan(level=1), MemoryPlan(level=2), *(MemoryPlan(level=3, blocks=n) for n in range(LAYERS + 1))]
RESIDENT = MemoryPlan()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("offload"), MODEL)


@pytest.fixture
def rig(checkpoint: Path) -> Iterator[Rig]:
    with Rig(checkpoint, MODEL) as rig:
        yield rig


def both_experts(**fields: object) -> Job:
    """A job whose steps are of both experts."""
    return make_job(steps=5, guidance_scale_2=2.0, **fields)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.level}-{plan.blocks}")
def test_every_level_gives_the_same_latents(rig: Rig, plan: MemoryPlan) -> None:
    job = both_experts()
    expected = denoise(rig, job)
    stage = rig.load("dit", memory=plan)
    assert torch.equal(denoise(rig, job, stage), expected)
    again = denoise(rig, job, stage)
    assert torch.equal(again, expected)
    assert not torch.equal(denoise(rig, both_experts(seed=8), stage), expected)
    assert is_empty(rig)


def test_a_level_changes_between_any_two_steps(rig: Rig) -> None:
    job = both_experts()
    stage = rig.load("dit")
    expected = denoise(rig, job, stage)
    for seed in range(12):
        draw = random.Random(seed)
        changes = {draw.randrange(job.steps): draw.choice([RESIDENT, *PLANS]) for _ in range(3)}
        put_prompts(rig, job)
        stage.begin(job)
        for index in range(job.steps):
            if index in changes:
                left: list[tuple[str, str]] = []
                stage.set_memory(changes[index], left)
                assert left == []  # on a CPU, device memory is host memory
            step(stage, job, index)
        stage.drop(job.id)
        assert torch.equal(take_latents(rig, job), expected), f"seed {seed}: {changes}"
    assert is_empty(rig)


def test_the_next_expert_is_there_before_its_first_step(rig: Rig) -> None:
    """Its context is made, and its first blocks are brought, in the last step of the one before."""
    job = both_experts()
    stage = rig.load("dit", memory=MemoryPlan(level=3, blocks=2))
    assert isinstance(stage, DitStage)
    put_prompts(rig, job)
    stage.begin(job)
    made = []
    for index in range(job.steps):
        step(stage, job, index)
        made.append(stage._tasks[job.id].next is not None)
    assert made.count(True) == 1
    last_of_high = made.index(True)
    assert stage._pools is not None
    stage.drop(job.id)
    take_latents(rig, job)
    put_prompts(rig, job)
    stage.begin(job)
    for index in range(last_of_high + 1):
        step(stage, job, index)
    held = {room.holds for room in stage._pools._pools["blocks"]._rooms}
    assert {key[0] for key, _ in filter(None, held)} == {"transformer_2"}  # type: ignore[index]
    stage.drop(job.id)


def test_what_was_copied_is_told_once(rig: Rig) -> None:
    """Of each step at level 3: the blocks that do not stay, in the time of the step and of the one before; at level 0,
    nothing."""
    job = both_experts()
    stage = rig.load("dit", memory=MemoryPlan(level=3, blocks=2))
    assert isinstance(stage, DitStage)
    put_prompts(rig, job)
    stage.begin(job)
    step(stage, job, 0)
    began = time.monotonic()
    step(stage, job, 1)
    assert stage._pools is not None
    stage._pools.lane.finish()
    stage.copied()
    step(stage, job, 2)
    stage._pools.lane.finish()
    told = stage.copied()
    assert told is not None and stage.copied() is None
    assert began < told.begin < told.end < time.monotonic() and 0 < told.seconds <= told.end - told.begin
    parts, copied = transformer_bytes(MODEL.transformer, "float32"), 2 * (LAYERS - 2)
    gaps = told.bytes - copied * parts.block
    assert 0 <= gaps < copied * parts.cross / 4, "two forwards, and of no block what makes keys and values"
    stage.set_memory(RESIDENT, [])
    step(stage, job, 3)
    assert stage.copied() is None
    stage.drop(job.id)


def test_tasks_of_both_experts_take_turns(rig: Rig) -> None:
    """Whichever expert a step is of, its weights come, whatever was foreseen."""
    jobs = [both_experts(seed=n) for n in range(2)]
    expected = [denoise(rig, job) for job in jobs]
    stage = rig.load("dit", memory=MemoryPlan(level=3, blocks=2))
    for job in jobs:
        put_prompts(rig, job)
        stage.begin(job)
    for index in range(2):
        step(stage, jobs[0], index)
    for index in range(jobs[0].steps - 2):
        step(stage, jobs[1], index)
        step(stage, jobs[0], 2 + index)
    for index in range(jobs[1].steps - 2, jobs[1].steps):
        step(stage, jobs[1], index)
    for job, latents in zip(jobs, expected, strict=True):
        stage.drop(job.id)
        assert torch.equal(take_latents(rig, job), latents)


def test_a_killed_dit_resumes_at_another_level(rig: Rig) -> None:
    job = both_experts()
    first = rig.load("dit")
    expected = denoise(rig, job, first)
    put_prompts(rig, job)
    first.begin(job)
    step(first, job, 1)
    rig.reclaim("dit")
    second = rig.load("dit", memory=MemoryPlan(level=3, blocks=1), placed=[v for v, _ in rig._placed(("dit",))])
    second.begin(job)
    for index in range(2, job.steps):
        step(second, job, index)
    second.drop(job.id)
    assert torch.equal(take_latents(rig, job), expected)


def test_adapters_add_the_same_bits(rig: Rig, tmp_path: Path) -> None:
    pair = Adapters(tmp_path, "a", 1, 2)
    plain, adapted = both_experts(), both_experts(loras=[pair.at(0.7)])
    resident = rig.load("dit")
    assert isinstance(resident, DitStage)
    pair.lend(resident)
    expected = {job.id: denoise(rig, job, resident) for job in (plain, adapted)}
    assert not torch.equal(expected[plain.id], expected[adapted.id])
    for plan in PLANS[1::3]:
        stage = rig.load("dit", memory=plan)
        assert isinstance(stage, DitStage)
        for job in (plain, adapted, plain):
            pair.lend(stage)
            assert torch.equal(denoise(rig, job, stage), expected[job.id]), f"{plan}, {job.id}"


def test_image_tokens_have_the_same_keys(tmp_path: Path) -> None:
    with Rig(make_checkpoint(tmp_path / "channels", CHANNELS), CHANNELS) as rig:
        job = image_job(rig)
        put_image(rig, job)
        expected = denoise(rig, job)
        put_image(rig, job)
        assert torch.equal(denoise(rig, job, rig.load("dit", memory=MemoryPlan(level=3))), expected)


class JitteryLane(HostLane):
    """Copies that come late, and in their order."""

    def __init__(self) -> None:
        super().__init__()
        self._draw = random.Random(4)

    def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
        begin = threading.Event()
        threading.Timer(self._draw.random() * 0.004, begin.set).start()
        super().copy((), begin)
        return super().copy(pairs, after)


class HastyLane(JitteryLane):
    """The control: nobody waits for what is copied."""

    def wait(self, mark: Mark) -> None:
        pass


class WatchedLane(HostLane):
    """Counts how often the host waits for copies."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def finish(self) -> None:
        self.waits += 1
        super().finish()


def test_the_host_waits_for_no_copy_inside_a_step(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At level 3 marks alone say what is there, also while the next expert's blocks and context are made. At the first
    step of an expert, what the one before had beside its blocks is given back: that is waited for, once."""
    lane, job, waits = WatchedLane(), both_experts(), []
    monkeypatch.setattr("stages.weights.lane_of", lambda device: lane)
    for blocks in (0, 2):
        stage = rig.load("dit", memory=MemoryPlan(level=3, blocks=blocks))
        put_prompts(rig, job)
        stage.begin(job)
        for index in range(job.steps):
            before = lane.waits
            step(stage, job, index)
            waits.append(lane.waits - before)
        stage.drop(job.id)
        take_latents(rig, job)
    assert waits == [0, 0, 1, 0, 0] * 2


def denoised_with(rig: Rig, lane: Lane, job: Job, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr("stages.weights.lane_of", lambda device: lane)
    return denoise(rig, job, rig.load("dit", memory=MemoryPlan(level=3, blocks=1)))


def test_late_copies_are_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    job = both_experts()
    expected = denoise(rig, job)
    assert torch.equal(denoised_with(rig, JitteryLane(), job, monkeypatch), expected)
    try:
        hasty = denoised_with(rig, HastyLane(), job, monkeypatch)
    except Exception as error:
        assert "not finite" in str(error)
    else:
        assert not torch.equal(hasty, expected)


def test_a_room_is_not_written_while_it_is_used() -> None:
    """The order in which a pool asks: no copy into a room before its piece was used, none used before it was copied."""
    asked: list[tuple[str, int]] = []

    class Noting(HostLane):
        def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
            mark = super().copy(pairs, after)
            asked.append(("copy", pairs[0][0].data_ptr()) if pairs else ("finish", 0))
            return mark

    module = WanTransformer(MODEL.transformer)
    shapes = shapes_of(module, lambda name: torch.float32, {})
    placement = weights.Placement.create("noted", shapes, runs_of(module))
    walk = module.walks()["blocks"]
    layout = layout_of(placement.table, walk)
    pools = Pools(torch.device("cpu"), Noting(), resident=2)
    source = source_of("a", placement, (), torch.device("cpu"))
    for _ in range(3):
        for piece in pools.walk("blocks", walk, layout, source):
            asked.append(("use", min(p.data_ptr() for p in piece.parameters() if not p.is_meta)))
    placement.close()
    uses = [at for kind, at in asked if kind == "use"]
    assert len(uses) == 3 * LAYERS
    assert len(set(uses)) == 4, "two that stay, two that take turns"
    for room in set(uses):
        kinds = [kind for kind, at in asked if at == room]
        # Copied before each use, but for those that stay, which are copied once.
        assert kinds[0] == "copy"
        assert "copycopy" not in "".join(kinds)
    stay = [room for room in set(uses) if [kind for kind, at in asked if at == room].count("copy") == 1]
    assert len(stay) == 2
    copies = sum(kind == "copy" for kind, _ in asked)
    assert copies == 2 + 3 * (LAYERS - 2) + 2, "those that stay once, the others once a walk, two of them ahead"


@pytest.mark.parametrize("build", [WanTransformer, build_text_encoder], ids=["transformer", "text_encoder"])
def test_every_tensor_has_its_place(build: object) -> None:
    """What moves, what is still, and what stays on the host are all there is, each once."""
    module = WanTransformer(MODEL.transformer) if build is WanTransformer else build_text_encoder(MODEL.text_encoder)
    assert isinstance(module, WalkedModule)
    aliases = {} if build is WanTransformer else {"encoder.embed_tokens.weight": "shared.weight"}
    table = lay_out(shapes_of(module, lambda name: torch.float32, aliases), runs_of(module))
    offload = Offload(module, table, aliases, Pools(torch.device("cpu"), lane_of(torch.device("cpu")), 0))
    names = [tensor.name for tensor in offload._still] + offload._on_host
    for walk in module.walks().values():
        layout = layout_of(table, walk)
        for number, prefix in enumerate(walk.prefixes):
            names += [prefix + tensor.name for tensor in layout.tensors]
            assert sum(stretch.size for stretch in layout.stretches[number]) <= layout.size
            assert all(stretch.room % ALIGNMENT == 0 for stretch in layout.stretches[number])
    assert sorted(names) == sorted(tensor.name for tensor in table.tensors)


def run(stages: dict[str, Stage], job: Job, plans: dict[int, MemoryPlan] | None = None) -> None:
    phases = {"text": "text", "encode": "vae", "denoise": "dit", "decode": "vae", "write": "writer"}
    for stage in stages.values():
        stage.begin(job)
    for number, quantum in enumerate(quanta(job)):
        for stage in stages.values():
            if plans and number in plans:
                stage.set_memory(plans[number], [])
        finish(stages[phases[quantum.phase]], quantum)
    for stage in stages.values():
        stage.drop(job.id)


def test_all_stages_change_their_level_in_the_middle_of_a_video(rig: Rig, tmp_path: Path) -> None:
    stages = {name: rig.load(name) for name in ("text", "dit", "vae", "writer")}
    job = both_experts(output=tmp_path / "resident.mp4")
    run(stages, job)
    expected = np.stack([*read_frames(job.output, 9, 32, 48)])
    for seed in range(4):
        draw = random.Random(seed)
        plans = {draw.randrange(len(quanta(job))): draw.choice([RESIDENT, *PLANS]) for _ in range(4)}
        other = both_experts(output=tmp_path / f"{seed}.mp4")
        run(stages, other, plans)
        assert (np.stack([*read_frames(other.output, 9, 32, 48)]) == expected).all(), f"seed {seed}: {plans}"
    assert is_empty(rig)


def on_device(network: AnyNetwork) -> list[str]:
    """Tensors of an offloaded network that are on the device, beside those in its pools' rooms."""
    assert isinstance(network, weights.Network) and isinstance(network.module, WalkedModule)
    tensors = network.module.state_dict(keep_vars=True)
    return [name for name, t in tensors.items() if not t.is_meta and name not in network.module.on_host()]


@pytest.mark.parametrize("level", [2, 3])
def test_what_is_not_at_work_is_not_on_the_device(rig: Rig, level: int) -> None:
    """Of two experts the one that computes, and the next one from the step before its first on; of the text encoder
    nothing once the prompts are encoded, nor rooms for its blocks."""
    job, plan = both_experts(), MemoryPlan(level=level, blocks=1 if level == 3 else None)
    stage = rig.load("dit", memory=plan)
    put_prompts(rig, job)
    stage.begin(job)
    seen = []
    for index in range(job.steps):
        step(stage, job, index)
        seen.append(tuple(bool(on_device(stage.networks[name])) for name in EXPERTS))
    stage.drop(job.id)
    take_latents(rig, job)
    assert seen == [(True, False), (True, True), (False, True), (False, True), (False, True)], "made ready in step 1"
    text = rig.load("text", memory=plan)
    text.begin(job)
    assert text.step(Run(id=job.id, phase="text", index=0)) is None
    assert on_device(text.networks["text_encoder"]) == []
    assert isinstance(text, TextStage) and text._encoder.pools is not None and not text._encoder.pools._pools


def test_the_text_encoder_at_level_2_gives_the_same_embeddings(rig: Rig) -> None:
    def embeddings(stage: Stage) -> list[torch.Tensor]:
        job = make_job()
        stage.begin(job)
        stage.step(Run(id=job.id, phase="text", index=0))
        with rig_prompts(rig) as prompts:
            made = [slot_tensor(prompts.take(job.id, sequence, 1)).clone() for sequence in range(2)]
            prompts.release(job.id)
        return made

    expected = embeddings(rig.load("text"))
    actual = embeddings(rig.load("text", memory=MemoryPlan(level=2)))
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    assert not torch.equal(*expected)


def rig_prompts(rig: Rig) -> TensorQueue:
    queue = rig.memory.queues["prompts"]
    return TensorQueue.attach(queue.spec, queue.fds, "consumer", 1)


def test_without_room_on_the_device_it_goes_on_from_the_host(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second expert does not fit: the first goes back too, and the plan before holds."""
    job = both_experts()
    expected = denoise(rig, job)
    stage = rig.load("dit", memory=MemoryPlan(level=3, blocks=2))
    assert isinstance(stage, DitStage)
    asked: list[str] = []
    onload = weights.Network.onload

    def lacking(self: weights.Network[WanTransformer], *given: object, **named: object) -> None:
        asked.append(self._name)
        if len(asked) == 2:
            raise OutOfMemory("there is no room")
        onload(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(weights.Network, "onload", lacking)
    put_prompts(rig, job)
    stage.begin(job)
    for index in range(job.steps):
        if index == 2:
            with pytest.raises(OutOfMemory):
                stage.set_memory(RESIDENT, [])
            assert asked == ["transformer", "transformer_2"]
        if index == 3:
            stage.set_memory(RESIDENT, [])
        step(stage, job, index)
    stage.drop(job.id)
    assert torch.equal(take_latents(rig, job), expected)


def test_a_version_that_is_let_go_of_while_it_is_bound_leaves_the_device() -> None:
    """Another takes its place, the newest of those that are left, and is brought when it is next used."""
    module = WanTransformer(MODEL.transformer)
    shapes = shapes_of(module, lambda name: torch.float32, {})
    network: weights.Network[WanTransformer] = weights.Network(module, "a", shapes, {}, "", torch.device("cpu"))
    for content in ("first", "second", "third"):
        placement = weights.Placement.create(content, shapes, runs_of(module))
        network.adopt(placement.seal("a", content), placement.fd)
        placement.close()
    network.use("third")
    pools = Pools(network.device, network.lane, 0)
    network.offload(pools, [])
    network.use("third")
    assert network.bound_source.key == ("a", "third", ())
    network.forget("third")
    assert network.content == "second" and module.patch_embedding.weight.is_meta
    assert network.use("second") is module and not module.patch_embedding.weight.is_meta
    network.forget("first")
    assert network.content == "second"
    with pytest.raises(KeyError):
        network.use("third")
