"""What a request needs at each memory level: bytes on the GPU, bytes of host memory, and time. Pure accounting.

Weights are exact (`engine/weight_sizes.py`); what stages take beside them is reckoned from the coefficients in
`configs/measured/memory.yaml`. Stages on one GPU take turns, so the peak is that of the largest stage beside what stays
of the others. Levels: `MemoryPlan`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from engine.memory import device_sizes
from engine.models import CONFIGS, read_yaml
from engine.params import ModelParams
from engine.weight_sizes import (
    ITEM_BYTES,
    component_bytes,
    text_encoder_bytes,
    transformer_bytes,
    vae_bytes,
)
from ipc.architecture import VaeConfig
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import STAGE_OF_COMPONENT, StageName

ROOMS = 2
"""Of pieces of weights on the device, which are read and filled in turn where weights are streamed."""

STEPS = 8
"""Into so many equal parts `plans` cuts the blocks of level 3."""


class Coefficient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure of `configs/measured/memory.yaml`."""

    value: float
    measured: bool
    """False: derived, or a goal."""
    source: str


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of `configs/measured/memory.yaml`, which says what each is of."""

    gpu: str
    context_bytes: Coefficient
    dit_attention_bytes: Coefficient
    dit_width_bytes: Coefficient
    dit_hidden_bytes: Coefficient
    vae_pixel_bytes: Coefficient
    vae_plain_pixel_bytes: Coefficient
    vae_encode_pixel_bytes: Coefficient
    vae_tile_bytes: Coefficient
    vae_tile_pixel_bytes: Coefficient
    text_hidden_bytes: Coefficient
    copy_bytes_per_second: Coefficient
    copy_unlocked_bytes_per_second: Coefficient
    flops: Coefficient
    read_bytes_per_second: Coefficient
    block_seconds: Coefficient


@functools.cache
def measured() -> Measured:
    """What is in the repository. `BadConfig` if it cannot be read."""
    return read_yaml(CONFIGS / "measured" / "memory.yaml", Measured)


class RequestSize(msgspec.Struct, frozen=True, order=True):
    """What a request's memory depends on. Pixels, frames; `guided`: both branches are computed."""

    width: int
    height: int
    frames: int
    guided: bool = True
    image: bool = False
    """It starts from an image or a video, which is encoded; with some models all do."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What of an engine its memory depends on."""

    dtype: str = "bfloat16"
    processes: int = 3
    """With a context on the GPU: text, dit and vae, and a spare one; 1 if they are fused, 0 on a CPU."""
    queues: bool = True
    """Queues and state slots are on the GPU."""
    stages: tuple[StageName, ...] = ("text", "dit", "vae")
    """That compute there."""


class Need(msgspec.Struct, frozen=True):
    """What one plan takes, at most."""

    level: int
    blocks: int | None
    gpu: int
    """Bytes on the device: weights, activations, queues and states, contexts."""
    host: int
    """Bytes of host memory for weights."""
    clip: int
    """Bytes of host memory that grow with the request: of its clip, between the tiles."""
    slowdown: float
    """Of a step; 1.0: as if all were resident."""
    slowdown_unlocked: float
    """The same where the pages of the weights in host memory could not be locked."""

    @property
    def host_all(self) -> int:
        """Bytes of host memory for weights and the clip."""
        return self.host + self.clip

    @property
    def plan(self) -> MemoryPlan:
        return MemoryPlan(level=self.level, blocks=self.blocks)


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing that is allowed fits."""

    least: Need
    """Of what is allowed, what takes the least of the GPU; if host memory allows nothing, the least of that."""
    missing: int
    """Bytes of the GPU that are lacking for it."""
    missing_host: int
    """Bytes of host memory that are."""
    frames: int | None
    """At this size so many would fit; None: not even one."""
    size: tuple[int, int] | None
    """Width and height that would fit with all frames, of about the same aspect; None: there is none."""
    level: int | None
    """The memory level that would fit, if it is not allowed; None: none would."""
    budget: int
    """Bytes of the GPU from which on it fits."""
    host: int | None
    """Bytes of host memory from which on it fits, with the GPU as it is; None: with no more of that."""

    def __str__(self) -> str:
        lacks: list[tuple[int, int, str]] = [(self.least.gpu, self.missing, "GPU")] if self.missing else []
        lacks += [(self.least.host_all, self.missing_host, "host")] if self.missing_host else []
        takes = [
            f"{gigabytes(amount)} of {what} memory at memory level {self.least.level}, {gigabytes(missing)} more than "
            "there is for it"
            for amount, missing, what in lacks
        ]
        changes = [] if self.frames is None else [f"{self.frames} frames"]
        changes += [] if self.size is None else [f"{self.size[0]}x{self.size[1]}"]
        changes += [] if self.level is None else [f"memory_level {self.level}"]
        changes.append(" and ".join(f"{gigabytes(amount)} of {what} memory" for amount, _, what in lacks))
        if self.host is not None and (self.missing or self.host != self.least.host_all):
            changes.append(f"{gigabytes(self.host)} of host memory")
        return f"it takes {' and '.join(takes)}; what would fit: {', or '.join(changes)}"


def gigabytes(amount: int) -> str:
    """Rounded up to a tenth, so that what is named suffices."""
    return f"{-(-amount // 10**8) / 10:.1f} GB"


DEFAULT_SETTING = Setting()
"""As on a GPU, a process per stage."""


def needs(
    model: ModelParams, size: RequestSize, setting: Setting = DEFAULT_SETTING, blocks: int | None = None
) -> list[Need]:
    """One of each level, at level 3 with no block resident; then, if `blocks` are given, with so many."""
    found = [need(model, size, MemoryPlan(level=level), setting) for level in (0, 1, 2)]
    found.append(need(model, size, MemoryPlan(level=3, blocks=0), setting))
    if blocks is not None:
        found.append(need(model, size, MemoryPlan(level=3, blocks=blocks), setting))
    return found


def plans(model: ModelParams) -> list[MemoryPlan]:
    """What a policy chooses from, what leaves the most on the device first: levels 0, 1, 2, then level 3 with fewer and
    fewer blocks, an eighth at a time."""
    layers = model.transformer.num_layers
    blocks = sorted({layers * step // STEPS for step in range(STEPS + 1)}, reverse=True)
    return [MemoryPlan(level=level) for level in (0, 1, 2)] + [MemoryPlan(level=3, blocks=n) for n in blocks]


class Account:
    """What plans take in one engine. Remembers what it has reckoned."""

    def __init__(self, model: ModelParams, setting: Setting = DEFAULT_SETTING) -> None:
        self._need = functools.lru_cache(4096)(functools.partial(need, model, setting=setting))
        self._usual = usual_size(model)

    def need(self, running: RequestSize | None, plan: MemoryPlan) -> Need:
        """While a request of this size runs; with None, what one of the model's usual size would need."""
        return self._need(running or self._usual, plan)


def usual_size(model: ModelParams) -> RequestSize:
    """Of a request that says nothing of its size."""
    usual = model.defaults
    guided = max(usual.guidance_scale, usual.guidance_scale_2 or 0.0) > 1
    return RequestSize(usual.width, usual.height, usual.num_frames, guided)


def need(model: ModelParams, size: RequestSize, plan: MemoryPlan, setting: Setting = DEFAULT_SETTING) -> Need:
    """What the plan takes while a request of this size is computed."""
    figures, stages = measured(), setting.stages
    sizes = {n: b for n, b in component_bytes(model, setting.dtype).items() if STAGE_OF_COMPONENT[n] in stages}
    beside = int(setting.processes * figures.context_bytes.value)
    beside += sum(device_sizes(model).values()) if setting.queues else 0
    working = working_bytes(model, size, plan, setting)
    if plan.level < 2:
        resident, host = sum(sizes.values()), 0
    else:
        resident, host = resident_dit(model, plan, setting.dtype) if "dit" in stages else 0, sum(sizes.values())
    blocks, slowdown, unlocked = None, 1.0, 1.0
    if plan.level == 3:
        blocks = plan.blocks or 0
    if blocks is not None and "dit" in stages:
        slowdown = step_slowdown(model, size, blocks, setting.dtype)
        unlocked = step_slowdown(model, size, blocks, setting.dtype, locked=False)
    clip = clip_bytes(model, size, setting.dtype) if plan.level >= 1 and "vae" in stages else 0
    return Need(plan.level, blocks, beside + resident + max(working.values()), host, clip, slowdown, unlocked)


def allocation_limits(model: ModelParams, plan: MemoryPlan, setting: Setting, budget: int) -> dict[StageName, int]:
    """What the process of each stage may allocate so that the engine stays in `budget` bytes of the device: that less
    contexts, queues, weights behind descriptors, and what the dit keeps while another process works."""
    sizes = {n: b for n, b in component_bytes(model, setting.dtype).items() if STAGE_OF_COMPONENT[n] in setting.stages}
    left = budget - int(setting.processes * measured().context_bytes.value)
    left -= sum(device_sizes(model).values()) if setting.queues else 0
    left -= sum(sizes.values()) if plan.level < 2 else 0
    apart = plan.level >= 2 and "dit" in setting.stages and setting.processes > 1
    kept = resident_dit(model, plan, setting.dtype) if apart else 0
    return {stage: max(0, left - (kept if stage != "dit" else 0)) for stage in setting.stages}


def resident_dit(model: ModelParams, plan: MemoryPlan, dtype: str) -> int:
    """Bytes of the transformer at work that stay on the device from level 2 on: what every step reads, or rooms for the
    blocks of it that take turns (`stages/offload.py`)."""
    parts = transformer_bytes(model.transformer, dtype)
    stay = parts.layers if plan.level < 3 else min(plan.blocks or 0, parts.layers)
    return parts.rest + (stay + min(ROOMS, parts.layers - stay)) * parts.block


def working_bytes(model: ModelParams, size: RequestSize, plan: MemoryPlan, setting: Setting) -> dict[StageName, int]:
    """What each stage takes of the device while it works, beside the weights that stay there: activations, and from
    level 2 on what it brings in."""
    sizes, away = component_bytes(model, setting.dtype), plan.level >= 2
    text, vae = text_bytes(model, setting.dtype), vae_working_bytes(model, size, setting, tiled=plan.level >= 1)
    if away:
        text += ROOMS * text_encoder_bytes(model.text_encoder, setting.dtype).block
        vae += sizes["vae"] + sizes.get("image_encoder", 0)
    dit = dit_bytes(model, size, setting.dtype, away=away, ahead=away and keeps_blocks(plan))
    working: dict[StageName, int] = {"text": text, "dit": dit, "vae": vae}
    return {stage: amount for stage, amount in working.items() if stage in setting.stages}


def tokens_of(model: ModelParams, size: RequestSize) -> int:
    """Tokens that the transformer sees."""
    vae, (pt, ph, pw) = model.vae, model.transformer.patch_size
    frames = (size.frames - 1) // vae.temporal_stride + 1
    return frames // pt * (size.height // vae.spatial_stride // ph) * (size.width // vae.spatial_stride // pw)


def keeps_blocks(plan: MemoryPlan) -> bool:
    """Blocks of the DiT stay on the device. Where none do, the last step of one expert makes nothing for the other."""
    return plan.level < 3 or bool(plan.blocks)


def dit_bytes(model: ModelParams, size: RequestSize, dtype: str, *, away: bool = False, ahead: bool = False) -> int:
    """Of a task that is denoised, beside the weights that stay: the keys and values of what it attends to, and a
    forward's activations or, before the first, what makes those, which from level 2 on (`away`) is brought in. `ahead`:
    with two experts, that happens beside the last forward of the one before."""
    figures, config = measured(), model.transformer
    attention = figures.dit_attention_bytes.value * config.dim
    feed_forward = figures.dit_width_bytes.value * config.dim + figures.dit_hidden_bytes.value * config.ffn_dim
    forward = int(tokens_of(model, size) * max(attention, feed_forward) * ITEM_BYTES[dtype] / 2)
    keys, parts = keys_bytes(model, size, dtype), transformer_bytes(config, dtype)
    making = keys + (parts.embedder + ROOMS * parts.cross if away else 0)
    if ahead and model.boundary is not None:
        return keys + forward + keys + making
    return keys + max(forward, making)


def keys_bytes(model: ModelParams, size: RequestSize, dtype: str) -> int:
    """Keys and values of the prompt, of the negative one too if there is guidance, and of an image's tokens."""
    config = model.transformer
    rows = config.text_len * (2 if size.guided else 1)
    rows += model.image_encoder.tokens if model.image_encoder is not None else 0
    return 2 * config.num_layers * rows * config.dim * ITEM_BYTES[dtype]


def text_bytes(model: ModelParams, dtype: str) -> int:
    """Of encoding a prompt of the longest length, beside the weights."""
    config, tokens, item = model.text_encoder, model.transformer.text_len, ITEM_BYTES[dtype]
    bias = 2 * config.num_heads * tokens**2 * item
    return int(measured().text_hidden_bytes.value * tokens * config.d_ff * item / 2) + bias


def vae_working_bytes(model: ModelParams, size: RequestSize, setting: Setting, *, tiled: bool) -> int:
    """Of decoding, and of encoding where there is something to encode; beside the weights in float32, but with the copy
    of them that the kernels read."""
    figures, pixels = measured(), size.width * size.height
    plain = setting.dtype == "float32"
    decode = (figures.vae_plain_pixel_bytes if plain else figures.vae_pixel_bytes).value * pixels
    encodes = size.image or model.conditioning == "channels"
    encode = figures.vae_encode_pixel_bytes.value * pixels if encodes else 0
    most = max(decode, encode)
    if tiled:
        most = min(most, figures.vae_tile_bytes.value + figures.vae_tile_pixel_bytes.value * pixels)
    return int(most) + (0 if setting.dtype == "float32" else vae_bytes(model.vae) // 2)


def clip_bytes(model: ModelParams, size: RequestSize, dtype: str) -> int:
    """Of host memory, of a clip that is decoded, or encoded, in tiles (`stages/vae_clips.py`): it grows with the clip,
    as the tiles come one after another, each through all frames."""
    decoded = decoded_bytes(model.vae, size, dtype)
    if model.conditioning == "channels":
        return max(decoded, encoded_bytes(model.vae, size, dtype, read=1))
    return max(decoded, encoded_bytes(model.vae, size, dtype, read=size.frames)) if size.image else decoded


def decoded_bytes(vae: VaeConfig, size: RequestSize, dtype: str) -> int:
    """All frames, and what the tiles are made of: what comes out of the lowest level, and with Wan2.2's VAE what went
    in. In float32, as plain torch keeps it, else as the kernels do."""
    latents, pixels = latents_of(vae, size)
    base = vae.base_dim if vae.decoder_base_dim is None else vae.decoder_base_dim
    risen = (2 * latents - 1 if vae.temporal_downsample[-1] else latents) + (latents if vae.is_residual else 0)
    return size.frames * 3 * size.width * size.height + risen * pixels * base * vae.dim_mult[-1] * ITEM_BYTES[dtype]


def encoded_bytes(vae: VaeConfig, size: RequestSize, dtype: str, *, read: int) -> int:
    """The frames that are `read`, and what the tiles make: what goes into the lowest level, and for the kernels the
    norm of it."""
    latents, pixels = latents_of(vae, size)
    sunk = latents if dtype == "float32" else 2 * latents
    return read * 3 * size.width * size.height + sunk * pixels * vae.base_dim * vae.dim_mult[-2] * ITEM_BYTES[dtype]


def latents_of(vae: VaeConfig, size: RequestSize) -> tuple[int, int]:
    """Latent frames, and pixels of each."""
    scale = vae.spatial_stride
    return (size.frames - 1) // vae.temporal_stride + 1, (size.width // scale) * (size.height // scale)


def forward_flops(model: ModelParams, tokens: int) -> float:
    """Of one forward. Source: the shapes of the products; the 14B at 32,760 tokens: 1,678e12."""
    config = model.transformer
    products = 2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    attention = 4 * tokens * (tokens + config.text_len) * config.dim
    return float(config.num_layers * (products + attention))


def step_slowdown(model: ModelParams, size: RequestSize, blocks: int, dtype: str, *, locked: bool = True) -> float:
    """A step at level 3 over a step with all weights resident: blocks are copied while others compute, so that a step
    takes the longer of the two; from pages that are not locked one after the other, so that it takes both."""
    figures, transformer = measured(), transformer_bytes(model.transformer, dtype)
    rate = figures.copy_bytes_per_second if locked else figures.copy_unlocked_bytes_per_second
    copied = (transformer.layers - blocks) * transformer.block / rate.value
    computed = max(
        forward_flops(model, tokens_of(model, size)) / figures.flops.value,
        transformer.layers * transformer.block / figures.read_bytes_per_second.value,
        transformer.layers * figures.block_seconds.value,
    )
    return max(1.0, copied / computed) if locked else 1.0 + copied / computed


def break_even_tokens(model: ModelParams, dtype: str, copy_rate: float, flops: float) -> int:
    """From so many tokens on, streaming all blocks costs nothing; copies in bytes, computing in operations per
    second."""
    seconds = (blocks := transformer_bytes(model.transformer, dtype)).layers * blocks.block / copy_rate
    low, high = 0, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if forward_flops(model, middle) / flops < seconds else (low, middle)
    return high


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Which plans are allowed."""

    lowest: int = 0
    highest: int = 3
    host: int | None = None
    """Bytes of host memory that weights and a clip may take; None: unlimited."""

    def allow(self, found: Need) -> bool:
        return self.lowest <= found.level <= self.highest and (self.host is None or found.host_all <= self.host)


ALL_LEVELS = Bounds()


def plan_for(
    model: ModelParams,
    size: RequestSize,
    budget: int,
    setting: Setting = DEFAULT_SETTING,
    bounds: Bounds = ALL_LEVELS,
) -> MemoryPlan | None:
    """The lowest level that fits into `budget` bytes of the GPU, and at level 3 the most resident blocks; None: nothing
    does, and `refusal` says why."""
    every = [MemoryPlan(level=level) for level in (0, 1, 2)]
    every += [MemoryPlan(level=3, blocks=count) for count in range(model.transformer.num_layers, -1, -1)]
    found = (need(model, size, plan, setting) for plan in every)
    return next((n.plan for n in found if n.gpu <= budget and bounds.allow(n)), None)


def refusal(
    model: ModelParams,
    size: RequestSize,
    budget: int,
    setting: Setting = DEFAULT_SETTING,
    bounds: Bounds = ALL_LEVELS,
) -> Refusal:
    """Why no plan fits, and what would. For sizes that `plan_for` has none for."""

    def fits(other: RequestSize) -> bool:
        return any(n.gpu <= budget and bounds.allow(n) for n in needs(model, other, setting))

    account = [n for n in needs(model, size, setting) if bounds.lowest <= n.level <= bounds.highest]
    there = [n for n in account if bounds.allow(n)]
    # Of two that take as much the higher level: what it lacks, a lower one lacks, too.
    least = min(reversed(there), key=lambda n: n.gpu) if there else min(account, key=lambda n: n.host_all)
    missing_host = 0 if there or bounds.host is None else least.host_all - bounds.host
    enough = [n.host_all for n in account if n.gpu <= budget]
    stride = model.vae.temporal_stride
    fewer = (msgspec.structs.replace(size, frames=f) for f in range(size.frames - stride, 0, -stride))
    frames = next((other.frames for other in fewer if fits(other)), None)
    smaller = next((other for other in smaller_sizes(model, size) if fits(other)), None)
    other_level = plan_for(model, size, budget, setting, Bounds(host=bounds.host))
    return Refusal(
        least=least, missing=max(0, least.gpu - budget), missing_host=missing_host, frames=frames,
        size=None if smaller is None else (smaller.width, smaller.height),
        level=None if other_level is None else other_level.level, budget=least.gpu, host=min(enough, default=None),
    )  # fmt: skip


def smaller_sizes(model: ModelParams, size: RequestSize) -> Sequence[RequestSize]:
    """Sizes that the model takes, of about the same aspect, from the largest that is smaller on."""
    multiple = model.size_multiple
    rows = range(size.height - multiple, 0, -multiple)
    widths = [max(multiple, round(size.width * height / size.height / multiple) * multiple) for height in rows]
    return [
        msgspec.structs.replace(size, width=min(width, size.width), height=height)
        for height, width in zip(rows, widths, strict=True)
    ]
