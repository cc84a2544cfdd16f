"""The dit stage: steps, their state, and what happens when the process is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ipc.errors import NumericalError
from ipc.messages import Job, Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import load_tensors, put_tensor, slot_tensor
from stages import solvers
from stages.dit import DitStage
from stages.models.transformer import WanTransformer
from stages.sampling import get_noise, schedule_of
from stages.stage import Stage
from tests.stages.rig import TWO_EXPERTS, Rig, is_empty, make_job


def put(rig: Rig, name: str, job: Job, tensors: list[torch.Tensor]) -> None:
    queue = rig.memory.queues[name]  # type: ignore[index]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        for sequence, tensor in enumerate(tensors):
            put_tensor(producer, job.id, sequence, tensor, 1.0)


def put_prompts(rig: Rig, job: Job) -> list[torch.Tensor]:
    """Random embeddings of the prompt and the negative prompt, the same every time."""
    embeds = list(torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3)))
    put(rig, "prompts", job, embeds)
    return embeds


def step(stage: Stage, job: Job, index: int) -> None:
    stage.step(Run(id=job.id, phase="denoise", index=index))


def take_latents(rig: Rig, job: Job) -> torch.Tensor:
    """What the vae would find; its slot is free afterwards."""
    queue = rig.memory.queues["latents"]
    with TensorQueue.attach(queue.spec, queue.fds, "consumer", 1) as vae:
        latents = slot_tensor(vae.take(job.id, 0, 1)).clone()
        vae.release(job.id)
    return latents


def denoise(rig: Rig, job: Job, stage: Stage | None = None) -> torch.Tensor:
    """All steps in one process; everything is free afterwards."""
    stage = rig.load("dit") if stage is None else stage
    put_prompts(rig, job)
    stage.begin(job)
    for index in range(job.steps - job.start_step):
        step(stage, job, index)
    stage.drop(job.id)
    return take_latents(rig, job)


def reference(model: WanTransformer, job: Job, embeds: list[torch.Tensor]) -> torch.Tensor:
    """The denoising loop in a few lines, with one expert."""
    schedule = schedule_of(job)
    x = get_noise(job.seed, (4, 3, 4, 6))
    history = solvers.new_state(schedule, x)
    rope = model.rope(3, 4, 6)
    prompt, negative = (model.encode_prompt(e.unsqueeze(0)) for e in embeds)
    for index, timestep in enumerate(schedule.timesteps):
        time = torch.tensor([timestep])
        v, u = (model(x.unsqueeze(0), time, context, rope)[0] for context in (prompt, negative))
        x, history = solvers.step(schedule, index, u + job.guidance_scale * (v - u), x, history)
    return x


def test_the_loop_is_that_of_the_paper(rig: Rig) -> None:
    """The stage's latents equal, bit for bit, those of the plain loop over the same model; everything is free at the
    end, and progress was shown at every step."""
    stage = rig.load("dit")
    assert isinstance(stage, DitStage)
    beats = rig.beats
    job = make_job()
    latents = denoise(rig, job, stage)
    assert rig.beats == beats + job.steps
    with torch.inference_mode():
        expected = reference(stage._experts[0], job, put_prompts(rig, make_job(id="0" * 32)))
    assert torch.equal(latents, expected)
    rig.memory.queues["prompts"].purge("0" * 32)
    assert is_empty(rig)
    assert stage.state().tasks == frozenset() and stage.state().bytes == 0


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("lost_after", [1, 3, 4])
def test_a_successor_resumes_to_the_same_bytes(rig: Rig, solver: str, lost_after: int) -> None:
    """The process is lost after some steps, the last of them not reported: its successor gets that step again, does not
    compute it again, and ends with the same bytes as an undisturbed run."""
    undisturbed, job = make_job(solver=solver), make_job(solver=solver)
    expected = denoise(rig, undisturbed)
    put_prompts(rig, job)
    first = rig.load("dit")
    first.begin(job)
    for index in range(lost_after):
        step(first, job, index)
    if lost_after == 4:  # lost between the commit of the last step and the put
        take_latents(rig, job)
    rig.reclaim("dit")
    second = rig.load("dit")
    second.begin(job)
    beats = rig.beats
    step(second, job, lost_after - 1)
    assert rig.beats == beats
    for index in range(lost_after, 4):
        step(second, job, index)
    second.drop(job.id)
    assert torch.equal(take_latents(rig, job), expected)
    assert is_empty(rig)


def test_without_its_state_a_task_starts_over(rig: Rig) -> None:
    """Neither process nor state slot is left, but step 2 is asked for: the steps before it are computed again, and the
    bytes are the same."""
    expected = denoise(rig, make_job())
    job = make_job()
    put_prompts(rig, job)
    stage = rig.load("dit")
    stage.begin(job)
    for index in (2, 3):
        step(stage, job, index)
    stage.drop(job.id)
    assert torch.equal(take_latents(rig, job), expected)


def test_tasks_that_take_turns_do_not_disturb_each_other(rig: Rig) -> None:
    """Two tasks, step by step in turns: each ends with the bytes it has alone."""
    alone = [denoise(rig, make_job(seed=seed)) for seed in (1, 2)]
    stage = rig.load("dit")
    jobs = [make_job(seed=seed) for seed in (1, 2)]
    for job in jobs:
        put_prompts(rig, job)
        stage.begin(job)
    for index in range(4):
        for job in jobs:
            step(stage, job, index)
    assert stage.state().bytes > 0
    for job, expected in zip(jobs, alone, strict=True):
        stage.drop(job.id)
        assert torch.equal(take_latents(rig, job), expected)


def test_an_init_video_is_kept_by_a_low_strength(rig: Rig) -> None:
    """The last of many steps only: the latents stay near the init latents. All steps: they go far from them."""
    init = torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    distances = []
    for start_step in (19, 0):
        job = make_job(steps=20, start_step=start_step, init="init.mp4", flow_shift=1.0)
        put(rig, "init_latents", job, [init])
        distances.append(float((denoise(rig, job) - init).abs().mean()))
        assert is_empty(rig)
    assert distances[0] < 0.5 * distances[1]


def test_two_experts_share_the_schedule(checkpoint: Path) -> None:
    """With a boundary, high timesteps go to `transformer` with guidance_scale, the others to `transformer_2` with
    guidance_scale_2; a resume on either side of the switch gives the same bytes."""
    with Rig(checkpoint, TWO_EXPERTS) as rig:
        fields = {"guidance_scale": 3.0, "guidance_scale_2": 1.0}
        stage = rig.load("dit")
        assert set(stage.weights) == {"transformer", "transformer_2"}
        assert stage.weights["transformer"] != stage.weights["transformer_2"]
        expected = denoise(rig, make_job(**fields), stage)
        assert not torch.equal(expected, denoise(rig, make_job(guidance_scale=3.0, guidance_scale_2=2.0), stage))
        assert not torch.equal(expected, denoise(rig, make_job(guidance_scale=2.0, guidance_scale_2=1.0), stage))
        job = make_job(**fields)
        put_prompts(rig, job)
        for index in range(4):
            rig.reclaim("dit")
            stage = rig.load("dit")
            stage.begin(job)
            step(stage, job, index)
        assert torch.equal(take_latents(rig, job), expected)


def test_a_step_that_is_not_finite_names_itself_and_is_not_committed(rig: Rig) -> None:
    """The weights turn to NaN after the first step: the second fails the request, the state stays that of the first,
    and another task is served."""
    stage = rig.load("dit")
    assert isinstance(stage, DitStage)
    job = make_job()
    put_prompts(rig, job)
    stage.begin(job)
    step(stage, job, 0)
    table = stage._experts[0].scale_shift_table
    kept = table.clone()
    table.fill_(torch.nan)
    with pytest.raises(NumericalError, match="step 2 of 4"):
        step(stage, job, 1)
    slot = rig.memory.state.find(job.id)
    assert slot is not None
    state = load_tensors(slot)
    assert state is not None and state[0] == 1
    stage.drop(job.id)
    table.copy_(kept)
    denoise(rig, make_job(), stage)
    assert is_empty(rig)


def test_bfloat16_weights_stay_near_float32(rig: Rig) -> None:
    """The same request with bfloat16 linears: near, not equal; latents and state are float32 all the same."""
    exact, near = denoise(rig, make_job()), denoise(rig, make_job(), rig.load("dit", dtype="bfloat16"))
    assert near.dtype == torch.float32
    assert not torch.equal(exact, near)
    assert float((exact - near).norm() / exact.norm()) < 0.05
