"""How exact the bfloat16 forward is, and how fast weights are read: tools/full_size.py runs these at full size."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.params import ModelParams
from hotreload.weights import load_weights
from ipc.messages.weights import Component
from stages.models import text_encoder
from stages.models.transformer import WanTransformer, keeps_float32
from stages.models.vae import WanVae
from tools.full_size_setup import Report, Workplace

OURS, THEIRS = 6e-3, 1.4e-2
"""Relative error of the velocity in bfloat16: ours at most; about what Diffusers' is, for comparison."""
LOAD_RATIO = 1.3
"""Loading weights may take this many times what `dd` takes for the same files."""
JUDGED_BYTES = 1_000_000_000
"""Of less, the time to load is mostly not that of reading."""
TIMESTEP = 637
PROMPT_ROWS = 60


def exact_float32() -> None:
    """No TF32 anywhere: float32 is the reference here."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def precision(place: Workplace, report: Report, name: str) -> None:
    """One forward in float32, then the same weights in bfloat16: ours and Diffusers'."""
    model = place.model(name)
    component = place.network(report, name, "transformer")
    exact_float32()
    inputs = make_inputs(place, model)
    exact, seconds = ours(component, model, place.device, torch.float32, inputs)
    release(place.device)
    report.say(f"latents {list(inputs[0].shape)}, timestep {TIMESTEP}; float32 forward {seconds:.2f} s (no TF32)")
    report.say(f"velocity: mean {exact.mean():+.3f}, deviation {exact.std():.3f}, largest {exact.abs().max():.2f}")
    half, seconds = ours(component, model, place.device, torch.bfloat16, inputs)
    release(place.device)
    error, theirs = relative(half, exact), relative(diffusers_forward(component, place.device, inputs), exact)
    release(place.device)
    report.say(f"bfloat16 forward {seconds:.2f} s")
    report.check(bool(torch.isfinite(exact).all() and torch.isfinite(half).all()), "outputs are finite")
    report.check(error <= OURS, f"bfloat16 against float32: relative error {error:.2e}, at most {OURS:.0e}")
    report.say(f"     Diffusers' bfloat16 against the same: {theirs:.2e} (elsewhere {THEIRS:.1e})")


def make_inputs(place: Workplace, model: ModelParams) -> tuple[Tensor, Tensor]:
    """Latents [1, C, T, h, w] of 832x480x81, or of the tiny model's size, and a prompt of `PROMPT_ROWS` rows."""
    generator = torch.Generator().manual_seed(1)
    frames, height, width = (5, 16, 16) if place.shrunken else (21, 60, 104)
    latents = torch.randn(1, model.transformer.in_channels, frames, height, width, generator=generator)
    prompt = torch.zeros(1, model.transformer.text_len, model.transformer.text_dim)
    prompt[:, :PROMPT_ROWS] = torch.randn(PROMPT_ROWS, model.transformer.text_dim, generator=generator)
    return latents.to(place.device), prompt.bfloat16().float().to(place.device)


@torch.inference_mode()
def ours(
    component: Component, model: ModelParams, device: str, dtype: torch.dtype, inputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, float]:
    """The velocity on the CPU, and the seconds of the second of two forwards."""
    with torch.device("meta"):
        network = WanTransformer(model.transformer)
    load_weights(
        network, component, device=device, dtype=lambda n: torch.float32 if keeps_float32(n) else dtype
    )  # fmt: skip
    latents, prompt = inputs
    context, rope = network.encode_prompt(prompt), network.rope(*latents.shape[2:])
    time_step = torch.tensor([TIMESTEP], device=device)
    return timed(lambda: network(latents, time_step, context, rope).cpu(), warm_up=dtype == torch.bfloat16)


@torch.inference_mode()
def diffusers_forward(component: Component, device: str, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Of Diffusers' model with the dtypes that `from_pretrained(torch_dtype=torch.bfloat16)` gives it."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    config = WanTransformer3DModel.load_config(Path(component.files[0]).parent)
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(config)
    c = network.config
    network.rope = WanRotaryPosEmbed(c.attention_head_dim, c.patch_size, c.rope_max_seq_len)
    exact = set(network._keep_in_fp32_modules)
    load_weights(
        network, component, device=device,
        dtype=lambda name: torch.float32 if exact & set(name.split(".")) else torch.bfloat16,
    )  # fmt: skip
    latents, prompt = inputs
    time_step = torch.tensor([TIMESTEP], device=device)
    output = network.to(device)(latents.bfloat16(), time_step, prompt.bfloat16(), return_dict=False)
    return output[0].float().cpu()


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def timed(call: Callable[[], Tensor], warm_up: bool) -> tuple[Tensor, float]:
    """The result of a call, and its seconds, after one more call if `warm_up`."""
    if warm_up:
        call()
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def release(device: str) -> None:
    """Give back the memory of networks that are gone."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def load_times(place: Workplace, report: Report, name: str) -> None:
    """Seconds and GB/s of `dd` and of loading each component, with the page cache empty and full."""
    model = place.model(name)
    components = [place.network(report, name, component) for component in model.components]
    if place.device != "cpu":
        torch.zeros(1, device=place.device)  # the CUDA context, which is not loading
    for component in components:
        size = sum(os.stat(file).st_size for file in component.files)
        for state in ("cold", "warm"):
            prepare = drop_from_cache if state == "cold" else read_once
            prepare(component.files)
            dd = seconds_of(lambda c=component: read_with_dd(c.files))
            prepare(component.files)
            ours = seconds_of(lambda c=component: load(c, model, place.device))
            release(place.device)
            rate = f"{ours:.2f} s, {size / ours / 1e9:.2f} GB/s; dd {dd:.2f} s, {size / dd / 1e9:.2f} GB/s"
            line = f"{component.name}, {size / 1e9:.2f} GB, {state}: {rate}"
            if size < JUDGED_BYTES:
                report.say(f"     {line}")
            else:
                report.check(ours <= LOAD_RATIO * dd, f"{line}; {ours / dd:.2f} times, at most {LOAD_RATIO}")


def load(component: Component, model: ModelParams, device: str) -> None:
    """As the stages load it on a GPU."""
    builders: dict[str, Callable[[], torch.nn.Module]] = {
        "text_encoder": lambda: text_encoder.build(model.text_encoder),
        "transformer": lambda: WanTransformer(model.transformer),
        "vae": lambda: WanVae(model.vae),
    }
    dtypes: dict[str, Callable[[str], torch.dtype]] = {
        "text_encoder": lambda n: torch.bfloat16,
        "transformer": lambda n: torch.float32 if keeps_float32(n) else torch.bfloat16,
        "vae": lambda n: torch.float32,
    }
    with torch.device("meta"):
        network = builders[component.name]()
    load_weights(
        network, component, device=device, dtype=dtypes[component.name],
        aliases=text_encoder.ALIASES if component.name == "text_encoder" else None,
    )  # fmt: skip
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def drop_from_cache(files: list[str]) -> None:
    """Have the kernel forget what it keeps of these files; on a memory file system it keeps all."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_once(files: list[str]) -> None:
    read_with_dd(files)


def read_with_dd(files: list[str]) -> None:
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M", "status=none"], check=True)
