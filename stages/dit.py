"""The dit stage: from noise to latents, one denoising step per quantum.

After each step the state goes to `StateSlots`, which outlive this process; the next process goes on from there and
comes to the same bytes. What it makes of the prompts and the image it makes again, from queue slots that are held until
the task is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipc.errors import BadRequest, NumericalError
from ipc.messages.job import Job
from ipc.messages.memory import OFFLOADED, MemoryPlan
from ipc.messages.reports import Chosen
from ipc.messages.stage import Run, Start
from ipc.messages.status import Copied
from ipc.state import StateSlot, StateSlots
from ipc.tensors import commit_tensors, dtype_of, load_tensors, put_tensor, slot_tensor
from stages import kernels, solvers
from stages.attention import choice
from stages.attention.backends import IMPLEMENTATIONS, Case
from stages.graphs import Graphs
from stages.lanes import Mark
from stages.models.blank import blank
from stages.models.transformer import Compute, WanTransformer, distinct_rows, keeps_float32
from stages.offload import Pools
from stages.sampling import (
    GRAPH_TOKENS,
    NO_IMAGE,
    Context,
    ImageLatents,
    expert_index,
    first_sample,
    forwards,
    get_noise,
    guided,
    image_channels,
    latent_shape,
    pin_first_frame,
    plainly,
    predict,
    schedule_of,
    timesteps_of,
)
from stages.solvers import Schedule
from stages.stage import QUEUE_TIMEOUT, AnyNetwork, Left, Links, StageState
from stages.weights import Bound, Network, hold

EXPERTS = ("transformer", "transformer_2")
"""Component of each, by `expert_index`."""


log = logging.getLogger(__name__)


class Maker(NamedTuple):
    """An expert, and the weights that it makes keys and values with."""

    expert: int
    bound: Bound


@dataclass(slots=True)
class Denoising:
    """A task here: where it is. `done` counts the steps that were run, from `schedule.start`."""

    job: Job
    schedule: Schedule
    image: ImageLatents
    slot: StateSlot
    """Where its state is committed."""
    latents: Tensor
    """[C, T, H, W] float32."""
    history: Tensor
    """Of the solver: `solvers.new_state`."""
    done: int = 0
    context: Context | None = None
    """What the expert of the last step attends to; made when its first step comes."""
    made_by: Maker | None = None
    """Of `context`."""
    next: tuple[Maker, Context, Mark] | None = None
    """Made ahead, for the expert of the next step; not to be used before the mark."""

    @property
    def total(self) -> int:
        return self.schedule.steps - self.schedule.start

    @property
    def bytes(self) -> int:
        """Held for the task by this process."""
        ahead = () if self.next is None else self.next[1].tensors
        context = () if self.context is None else self.context.tensors
        tensors = (self.latents, self.history, *self.image, *context, *ahead)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class DitStage:
    """Takes `prompts` and `init_latents`, puts `latents`.

    Error handling: `BadRequest` for noise from a device that this stage does not run on; `NumericalError` when a step
    gives values that are not finite; such a state is never committed.
    """

    def __init__(self, start: Start, links: Links, experts: list[Network[WanTransformer]], compute: Compute) -> None:
        self._start = start
        self._links = links
        self._device = start.devices["dit"]
        self._experts = experts
        self._compute = compute
        self._graphs = Graphs()
        self._pools: Pools | None = None
        """Of the experts' blocks, if those are in host memory."""
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, Denoising] = {}

    @classmethod
    def load(cls, start: Start, links: Links) -> DitStage:
        """Choose what to compute with, then build and bind one transformer, or two. Raises `BadCheckpoint`, and
        `BadConfig` for an attention backend that does not work here."""
        compute = choose_compute(start)
        links.choose(Chosen(attention=compute.attention, kernels=compute.kernels))
        names = EXPERTS[:1] if start.boundary is None else EXPERTS
        experts = []
        for name in names:
            with blank():
                model = WanTransformer(start.transformer)
            network = Network.load(
                model,
                start,
                links,
                name,
                device=start.devices["dit"],
                dtype=lambda key: torch.float32 if keeps_float32(key) else dtype_of(start.dtype),
            )
            model.compute = compute
            experts.append(network)
        stage = cls(start, links, experts, compute)
        stage.set_memory(start.memory, [])
        return stage

    @property
    def weights(self) -> Mapping[str, str]:
        return {name: network.content for name, network in self._all.items()}

    @property
    def networks(self) -> Mapping[str, AnyNetwork]:
        return self._all

    @property
    def _all(self) -> dict[str, Network[WanTransformer]]:
        return dict(zip(EXPERTS[: len(self._experts)], self._experts, strict=True))

    @property
    def versions(self) -> Mapping[str, str]:
        backend = self._compute.attention
        attention = f"{backend} ({IMPLEMENTATIONS[backend].version()})"
        return {"torch": str(torch.__version__), "attention": attention, "kernels": self._compute.kernels}

    def begin(self, job: Job) -> None:
        self._jobs[job.id] = job
        if (task := self._tasks.get(job.id)) is not None:
            task.job = job

    @torch.inference_mode()
    def step(self, run: Run) -> None:
        """Have `run.index` + 1 steps done, the steps before it included if this process has not seen the task."""
        task = self._tasks.get(run.id)
        if task is None:
            task = self._tasks[run.id] = self._take_up(self._jobs[run.id])
        while task.done <= run.index:
            self._advance(task)
        if task.done == task.total:
            put_tensor(self._links.outputs["latents"], run.id, 0, task.latents, QUEUE_TIMEOUT)

    def drop(self, identity: str) -> None:
        self._tasks.pop(identity, None)
        if (job := self._jobs.pop(identity, None)) is not None and job.loras:
            for network in self._experts:
                network.keep_adapters(self._jobs.values())
        self._links.inputs["prompts"].release(identity)
        self._links.inputs["init_latents"].release(identity)
        self._states.release(identity)

    @torch.inference_mode()
    def rehearse(self) -> None:
        config = self._start.transformer
        frames, height, width = size = tuple(2 * patch for patch in config.patch_size)
        extra = config.in_channels - config.out_channels
        image = ImageLatents(channels=torch.zeros(extra, *size, device=self._device)) if extra else NO_IMAGE
        rows = torch.zeros(1, config.text_len, config.text_dim, device=self._device)
        tokens = None
        for network in self._experts:
            model = network.use(network.content)
            if (images := self._start.image_encoder) is not None:
                tokens = model.encode_image(torch.zeros(1, images.tokens, images.hidden_size, device=self._device))
            time = model.encode_time(torch.tensor([500], device=self._device))
            context = Context(model.encode_prompt(rows), model.rope(frames, height, width), time, tokens)
            latents = torch.zeros(config.out_channels, *size, device=self._device)
            if not bool(torch.isfinite(predict(model, latents, 0, context, 1.0, image)).all()):
                raise NumericalError("a rehearsed step gave values that are not finite; check the weights")

    def set_memory(self, plan: MemoryPlan, left: Left) -> None:
        """With two experts, the blocks of the one at work are on the device, in rooms that both use in turn."""
        self._graphs = Graphs()  # they hold, and read, what is about to move
        pools, first = None, self._experts[0]
        if plan.level >= OFFLOADED:
            resident = None if plan.level == OFFLOADED else plan.blocks or 0
            pools = Pools(first.device, first.lane, resident)
        if self._pools is not None:
            self._pools.release()
        each = None if pools is None else [pools] * len(self._experts)
        hold(self._experts, each, self._links, left, outliving=self._start.outliving)
        self._pools = pools

    def copied(self) -> Copied | None:
        return self._experts[0].lane.copied()

    def state(self) -> StageState:
        return StageState(frozenset(self._jobs), sum(task.bytes for task in self._tasks.values()))

    @property
    def _states(self) -> StateSlots:
        assert self._links.states is not None, "the dit stage is started with state slots"
        return self._links.states

    def _take_up(self, job: Job) -> Denoising:
        """The task where the last process left it, or at its first step."""
        schedule, image = schedule_of(job), self._image(job)
        slot = self._states.claim(job.id)
        if (committed := load_tensors(slot)) is not None:
            done, tensors = committed
            latents = tensors["latents"].to(self._device)
            history = tensors.get("history", solvers.new_state(schedule, latents)).to(self._device)
            return Denoising(job, schedule, image, slot, latents, history, done)
        noise = get_noise(job.seed, latent_shape(job, self._start.vae), self._noise_device(job))
        init = self._init_latents(job, 0, noise.device) if job.init and job.init_as == "start" else None
        latents = pin_first_frame(first_sample(schedule, noise, init).to(self._device), image.first_frame)
        return Denoising(job, schedule, image, slot, latents, solvers.new_state(schedule, latents))

    def _noise_device(self, job: Job) -> str:
        if job.noise_device == "cpu":
            return "cpu"
        if torch.device(self._device).type != "cuda":
            raise BadRequest(f"noise_device is cuda, but the dit runs on {self._device}; use noise_device cpu")
        return self._device

    def _image(self, job: Job) -> ImageLatents:
        """The image, for a model that is conditioned on one, on the device; as the model wants it."""
        if job.init is None or job.init_as == "start":
            return NO_IMAGE
        latents = self._init_latents(job, 0, self._device)
        if job.init_as == "first_frame":
            return ImageLatents(first_frame=latents)
        return ImageLatents(channels=image_channels(latents, self._start.vae.temporal_stride))

    def _init_latents(self, job: Job, sequence: int, device: torch.device | str) -> Tensor:
        """A copy on the device of what the vae stage put for the task."""
        slot = self._links.inputs["init_latents"].take(job.id, sequence, QUEUE_TIMEOUT)
        return slot_tensor(slot).to(device, copy=True)

    def _advance(self, task: Denoising) -> None:
        """One step, checked, then committed."""
        index = task.schedule.start + task.done
        timestep = task.schedule.timesteps[index]
        expert = expert_index(timestep, self._start.boundary)
        scale = scales(task.job)[expert]
        model = self._bound(expert, task)
        maker = Maker(expert, self._experts[expert].bound)
        if task.context is None or task.made_by != maker:
            task.context = None  # free the other expert's keys and values first
            task.context, task.made_by = self._made_ahead(task, maker) or self._context(task, model, expert), maker
        run = plainly
        if self._pools is not None:
            self._bring_next(task, expert)
        elif task.latents.is_cuda and len(task.context.rope) <= GRAPH_TOKENS:
            # A graph reads the weights where they were when it was recorded.
            run = partial(self._graphs.run, (*maker, model.patch_embedding.weight.data_ptr()))
        velocity = predict(model, task.latents, index, task.context, scale, task.image, run)
        latents, history = solvers.step(task.schedule, index, velocity, task.latents, task.history)
        latents = pin_first_frame(latents, task.image.first_frame)
        if not bool(torch.isfinite(latents).all()):
            raise NumericalError(
                f"step {task.done + 1} of {task.total} gave values that are not finite; "
                "if it happens with other seeds too, use dtype float32 or check the weights"
            )
        task.latents, task.history = latents, history
        task.done += 1
        state = {"latents": latents} | ({"history": history} if history.numel() else {})
        commit_tensors(task.slot, task.done, state)
        self._links.beat()

    def _bring_next(self, task: Denoising, expert: int) -> None:
        """If the next step is the other expert's, make its context beside this step, and have its blocks come as those
        of this one are done with. Not where no block stays on the device: there is no memory for two contexts then."""
        assert self._pools is not None and task.context is not None
        if not self._pools.keeps_any:
            return
        following = task.schedule.start + task.done + 1
        if following == task.schedule.steps:
            return
        other = expert_index(task.schedule.timesteps[following], self._start.boundary)
        if other == expert:
            return
        network, lane = self._experts[other], self._pools.lane
        with lane.aside():
            model = network.of(task.job, task.done + 1)
            context = self._context(task, model, other)
            task.next = Maker(other, network.bound), context, lane.computed()
        self._pools.follow("blocks", network.bound_source, forwards(task.context))

    def _made_ahead(self, task: Denoising, maker: Maker) -> Context | None:
        """What was made of the prompts for this step in the one before."""
        if (ahead := task.next) is None:
            return None
        task.next = None
        ahead_of, context, mark = ahead
        if ahead_of != maker or self._pools is None:
            return None
        self._pools.lane.wait(mark)
        return context

    def _bound(self, expert: int, task: Denoising) -> WanTransformer:
        """The expert with the weights and adapters of the task. There is one overlay at a time: it takes as much
        memory as the tensors that it is of."""
        for number, network in enumerate(self._experts):
            if number != expert:
                network.release()
                if task.job.loras:
                    network.drop_overlay()
        return self._experts[expert].of(task.job, task.done)

    def _context(self, task: Denoising, model: WanTransformer, expert: int) -> Context:
        """Keys and values of the prompts and of the image's tokens for this expert, and all timesteps, embedded: once
        for all its steps."""
        queue = self._links.inputs["prompts"]
        embeds = [
            slot_tensor(queue.take(task.job.id, sequence, QUEUE_TIMEOUT)).to(self._device)
            for sequence in range(2 if guided(scales(task.job)[expert]) else 1)
        ]
        image = None
        if self._start.image_encoder is not None:
            image = model.encode_image(self._init_latents(task.job, 1, self._device).unsqueeze(0))
        times = model.encode_time(timesteps_of(task.schedule, task.image.first_frame is not None, self._device))
        prompts = torch.stack(embeds)
        encoded = model.encode_prompt(prompts, distinct_rows(prompts))
        return Context(encoded, model.rope(*task.latents.shape[1:]), times, image)


def scales(job: Job) -> tuple[float, float]:
    """Of guidance, by expert."""
    return job.guidance_scale, job.guidance_scale_2


def choose_compute(start: Start) -> Compute:
    """What `start` says, or, where it leaves that to this dit, what is right and fastest here. Raises `BadConfig`."""
    device, config = torch.device(start.devices["dit"]), start.transformer
    if device.type == "cuda":
        # Triton and FlashAttention launch on the current device, whatever their tensors'.
        torch.cuda.set_device(device.index or 0)
    dtype, heads, head_dim = dtype_of(start.dtype), config.num_attention_heads, config.attention_head_dim
    attention = choice.choose(start.attention, Case(device, dtype, head_dim), heads)
    kind, problem = kernels.choose(start.kernels, device, dtype, heads, head_dim)
    if problem and device.type == "cuda":
        log.warning("the Triton kernels are not used: %s", problem)
    return Compute(attention, kind)
