"""The dit stage: steps, their state, and what happens when the process is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.params import ModelParams
from ipc.errors import BadRequest, NumericalError
from ipc.messages.job import Job
from ipc.messages.stage import Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import load_tensors, put_tensor, slot_tensor
from stages import solvers
from stages.dit import DitStage
from stages.models.transformer import WanTransformer
from stages.sampling import get_noise, schedule_of
from stages.stage import Stage
from tests.stages.rig import CHANNELS, FIRST_FRAME, TWO_EXPERTS, Rig, is_empty, make_checkpoint, make_job

LATENTS = (4, 3, 4, 6)
"""Of the usual job: 9 frames of 32x48."""


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


def put_image(rig: Rig, job: Job) -> list[torch.Tensor]:
    """What the vae puts for an image: its latents as the model of the rig wants them, and tokens if it sees them."""
    generator = torch.Generator().manual_seed(4)
    frames = 1 if rig.model.conditioning == "first_frame" else LATENTS[1]
    tensors = [torch.randn(4, frames, *LATENTS[2:], generator=generator)]
    if rig.model.image_encoder is not None:
        encoder = rig.model.image_encoder
        tensors.append(torch.randn(encoder.tokens, encoder.hidden_size, generator=generator))
    put(rig, "init_latents", job, tensors)
    return tensors


def image_job(rig: Rig, **fields: object) -> Job:
    return make_job(init="image.png", init_as=rig.model.conditioning, **fields)


@pytest.fixture(scope="module")
def channels_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("channels"), CHANNELS)


@pytest.fixture(scope="module")
def two_experts_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the `transformer` of the usual checkpoint, and another as `transformer_2`."""
    return make_checkpoint(tmp_path_factory.mktemp("two-experts"), TWO_EXPERTS)


@pytest.fixture(params=[CHANNELS, FIRST_FRAME], ids=["channels", "first_frame"])
def image_rig(request: pytest.FixtureRequest, checkpoint: Path, channels_checkpoint: Path) -> Iterator[Rig]:
    model: ModelParams = request.param
    with Rig(channels_checkpoint if model is CHANNELS else checkpoint, model) as rig:
        yield rig


def reference(model: WanTransformer, job: Job, embeds: list[torch.Tensor]) -> torch.Tensor:
    """The denoising loop in a few lines, with one expert."""
    schedule = schedule_of(job)
    x = get_noise(job.seed, LATENTS)
    history = solvers.new_state(schedule, x)
    rope = model.rope(3, 4, 6)
    prompt, negative = (model.encode_prompt(e.unsqueeze(0)) for e in embeds)
    times = model.encode_time(torch.tensor(schedule.timesteps))
    for index in range(schedule.steps):
        time = times.row(index)
        v, u = (model.velocity(x.unsqueeze(0), time, context, rope)[0] for context in (prompt, negative))
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
        expected = reference(stage._experts[0].module, job, put_prompts(rig, make_job(id="0" * 32)))
    assert torch.equal(latents, expected)
    rig.memory.queues["prompts"].purge("0" * 32)
    assert is_empty(rig)
    assert stage.state().tasks == frozenset() and stage.state().bytes == 0


@torch.inference_mode()
def image_reference(
    model: WanTransformer, job: Job, embeds: list[torch.Tensor], image: list[torch.Tensor]
) -> torch.Tensor:
    """The loop of Diffusers' image-to-video pipeline over our model and solver: the first frame is put in before each
    forward and at the end, not into the solver's sample."""
    schedule = schedule_of(job)
    x = get_noise(job.seed, LATENTS)
    history = solvers.new_state(schedule, x)
    rope = model.rope(*LATENTS[1:])
    prompts = [model.encode_prompt(e.unsqueeze(0)) for e in embeds]
    tokens = model.encode_image(image[1].unsqueeze(0)) if len(image) > 1 else None
    keep = torch.ones(1, *LATENTS[1:])
    keep[:, 0] = 0
    condition = image[0] if job.init_as == "first_frame" else torch.cat([(1 - keep).expand(4, -1, -1, -1), image[0]])
    steps = [[0, t] if job.init_as == "first_frame" else t for t in schedule.timesteps]
    times = model.encode_time(torch.tensor(steps))
    for index in range(schedule.steps):
        given = (1 - keep) * condition + keep * x if job.init_as == "first_frame" else torch.cat([x, condition])
        v, u = (model.velocity(given.unsqueeze(0), times.row(index), prompt, rope, tokens)[0] for prompt in prompts)
        x, history = solvers.step(schedule, index, u + job.guidance_scale * (v - u), x, history)
    return (1 - keep) * condition + keep * x if job.init_as == "first_frame" else x


def test_an_image_conditions_every_step(image_rig: Rig) -> None:
    """An image for a model that takes its latents as channels, with CLIP's tokens, or as the first frame: the bytes are
    those of Diffusers' loop over the same model; another image gives others; every slot is free at the end."""
    stage = image_rig.load("dit")
    assert isinstance(stage, DitStage)
    job = image_job(image_rig)
    image = put_image(image_rig, job)
    latents = denoise(image_rig, job, stage)
    expected = image_reference(stage._experts[0].module, job, put_prompts(image_rig, make_job(id="0" * 32)), image)
    assert torch.equal(latents, expected)
    image_rig.memory.queues["prompts"].purge("0" * 32)
    for changed in range(len(image)):
        other = image_job(image_rig)
        put(image_rig, "init_latents", other, [x.flip(-1) if i == changed else x for i, x in enumerate(image)])
        difference = denoise(image_rig, other, stage)[:, 1:] - latents[:, 1:]
        assert float(difference.norm() / latents[:, 1:].norm()) > 1e-3
    assert is_empty(image_rig)


def test_every_committed_state_begins_with_the_image(checkpoint: Path) -> None:
    """With the image as first frame, the first latent frame of the state is the image's after each step, to the bit."""
    with Rig(checkpoint, FIRST_FRAME) as rig:
        stage, job = rig.load("dit"), image_job(rig)
        put_prompts(rig, job)
        (image,) = put_image(rig, job)
        stage.begin(job)
        for index in range(4):
            step(stage, job, index)
            slot = rig.memory.state.find(job.id)
            assert slot is not None
            state = load_tensors(slot)
            assert state is not None and torch.equal(state[1]["latents"][:, :1], image)
        stage.drop(job.id)
        assert torch.equal(take_latents(rig, job)[:, :1], image)


def test_a_first_frame_model_without_an_image(rig: Rig, checkpoint: Path) -> None:
    """Text to video with a model that can take a first frame: the bytes of the same model that cannot."""
    with Rig(checkpoint, FIRST_FRAME) as other:
        assert torch.equal(denoise(other, make_job()), denoise(rig, make_job()))


def test_a_successor_takes_the_image_up_again(image_rig: Rig) -> None:
    """A new process for each step of an image-to-video task: each finds the image in the queue; the same bytes."""
    undisturbed, job = image_job(image_rig), image_job(image_rig)
    put_image(image_rig, undisturbed)
    expected = denoise(image_rig, undisturbed)
    put_prompts(image_rig, job)
    put_image(image_rig, job)
    for index in range(4):
        image_rig.reclaim("dit")
        stage = image_rig.load("dit")
        stage.begin(job)
        step(stage, job, index)
    assert image_rig.depths()["init_latents"] > 0
    stage.drop(job.id)
    assert torch.equal(take_latents(image_rig, job), expected)
    assert is_empty(image_rig)


def test_the_bytes_that_a_task_holds(channels_checkpoint: Path) -> None:
    """After a step, `state` counts the latents, the history, the image's channels, and for both prompts and the image
    the keys and values, with the rotation table and the steps' embedded timesteps; the image's only once. Nothing after
    the drop."""
    with Rig(channels_checkpoint, CHANNELS) as rig:
        stage, job = rig.load("dit"), image_job(rig)
        put_prompts(rig, job)
        put_image(rig, job)
        stage.begin(job)
        assert stage.state().bytes == 0
        step(stage, job, 0)
        voxels, tokens, layers, width = 3 * 4 * 6, 3 * 2 * 3, 2, 24
        latents = (4 + 3 * 4 + 8) * voxels
        keys_values = layers * 2 * (12 + 12 + 5) * width
        assert stage.state().bytes == 4 * (latents + keys_values + tokens * 12 + job.steps * 7 * width)
        stage.drop(job.id)
        assert stage.state().bytes == 0


def test_noise_from_cuda_needs_a_dit_on_cuda(rig: Rig) -> None:
    """noise_device cuda and a dit on the CPU: the request fails, and says what to change; the next is served."""
    stage, job = rig.load("dit"), make_job(noise_device="cuda")
    put_prompts(rig, job)
    stage.begin(job)
    with pytest.raises(BadRequest, match="dit runs on cpu; use noise_device cpu"):
        step(stage, job, 0)
    stage.drop(job.id)
    denoise(rig, make_job(), stage)
    assert is_empty(rig)


@pytest.mark.gpu
def test_on_cuda(image_rig: Rig) -> None:
    """The dit on CUDA, noise drawn there: finite; a successor in the middle comes to the same bytes; noise from the CPU
    gives another video, near that of a dit on the CPU."""
    job = image_job(image_rig, noise_device="cuda")
    put_image(image_rig, job)
    expected = denoise(image_rig, job, image_rig.load("dit", devices={"dit": "cuda"}))
    assert bool(expected.isfinite().all())
    job = image_job(image_rig, noise_device="cuda")
    put_image(image_rig, job)
    put_prompts(image_rig, job)
    for indices in ((0, 1), (2, 3)):
        image_rig.reclaim("dit")
        stage = image_rig.load("dit", devices={"dit": "cuda"})
        stage.begin(job)
        for index in indices:
            step(stage, job, index)
    stage.drop(job.id)
    assert torch.equal(take_latents(image_rig, job), expected)
    on: dict[str, torch.Tensor] = {}
    for device in ("cuda", "cpu"):
        job = image_job(image_rig)
        put_image(image_rig, job)
        on[device] = denoise(image_rig, job, image_rig.load("dit", devices={"dit": device}))
    assert not torch.equal(on["cuda"], expected)
    torch.testing.assert_close(on["cuda"], on["cpu"], rtol=1e-2, atol=1e-2)


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


def test_two_experts_share_the_schedule(two_experts_checkpoint: Path) -> None:
    """With a boundary, high timesteps go to `transformer` with guidance_scale, the others to `transformer_2` with
    guidance_scale_2; a resume on either side of the switch gives the same bytes."""
    with Rig(two_experts_checkpoint, TWO_EXPERTS) as rig:
        fields = {"guidance_scale": 3.0, "guidance_scale_2": 1.0}
        stage = rig.load("dit")
        assert set(stage.weights) == set(rig.loaded) == {"transformer", "transformer_2"}
        assert all(done == total > 0 for done, total in rig.loaded.values())
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


@pytest.mark.parametrize("experts", [1, 2])
def test_what_is_the_same_at_every_step_is_made_once(
    experts: int, checkpoint: Path, two_experts_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of the prompts, and the embeddings of all timesteps: once per request, and once more for the
    second expert, whatever the number of steps."""
    made: dict[str, list[int]] = {"encode_prompt": [], "encode_time": []}
    for name, sizes in made.items():
        original = getattr(WanTransformer, name)

        def counted(
            model: WanTransformer,
            given: torch.Tensor,
            *rest: object,
            original: Callable[..., object] = original,
            sizes: list[int] = sizes,
        ) -> object:
            sizes.append(len(given))
            return original(model, given, *rest)

        monkeypatch.setattr(WanTransformer, name, counted)
    with Rig(two_experts_checkpoint, TWO_EXPERTS) if experts == 2 else Rig(checkpoint) as rig:
        stage = rig.load("dit")
        for steps in (4, 6):
            for sizes in made.values():
                sizes.clear()
            denoise(rig, make_job(steps=steps, guidance_scale=3.0, guidance_scale_2=3.0), stage)
            assert made == {"encode_prompt": [2] * experts, "encode_time": [steps] * experts}


def first_state(rig: Rig, **fields: object) -> torch.Tensor:
    """The latents that are committed after the first step."""
    stage, job = rig.load("dit"), make_job(**fields)
    put_prompts(rig, job)
    stage.begin(job)
    step(stage, job, 0)
    slot = rig.memory.state.find(job.id)
    assert slot is not None
    state = load_tensors(slot)
    assert state is not None
    stage.drop(job.id)
    return state[1]["latents"]


def test_the_first_step_is_the_high_noise_experts(rig: Rig, two_experts_checkpoint: Path) -> None:
    """The first step, at timestep 999, with two experts: the bytes of a model that has `transformer` only, guided by
    guidance_scale; guidance_scale_2 does not touch it."""
    with Rig(two_experts_checkpoint, TWO_EXPERTS) as two:
        latents = first_state(two, guidance_scale=2.0, guidance_scale_2=5.0)
    assert torch.equal(latents, first_state(rig, guidance_scale=2.0))
    assert not torch.equal(latents, first_state(rig, guidance_scale=5.0))


def test_a_step_that_is_not_finite_names_itself_and_is_not_committed(rig: Rig) -> None:
    """The weights turn to NaN after the first step: the second fails the request, the state stays that of the first,
    and another task is served."""
    stage = rig.load("dit")
    assert isinstance(stage, DitStage)
    job = make_job()
    put_prompts(rig, job)
    stage.begin(job)
    step(stage, job, 0)
    table = stage._experts[0].module.scale_shift_table
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
