"""The DiT against Diffusers on one device, in one process, in turns: eager, with cuDNN's attention, compiled per block.

    python -m tools.bench_dit attention kernels error
    python -m tools.bench_dit split-1.3b split-14b       # where the time of a forward goes
    python -m tools.bench_dit 1.3b-480p 1.3b-256 1.3b-1560 branches-1.3b
    python -m tools.bench_dit 14b-480p 14b-256 branches-14b
    python -m tools.bench_dit 14b-720p        # under 170 s on an H100

Both have the same random weights (tools/random_weights.py) in the same memory. Ours is timed as it is served: keys and
values of the prompt and the embedded timestep made before, once. Lines come as they are measured, and go to --out, too.
Checks say `ok` or `FAIL`; the exit status is 1 if one failed. On a machine without a GPU all models are shrunken.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import TransformerConfig
from ipc.messages.names import AttentionBackend, KernelKind
from stages import kernels, sampling
from stages.attention.backends import Case
from stages.attention.choice import choose
from stages.graphs import Graphs
from stages.models.transformer import Compute, WanTransformer, keeps_float32
from stages.weights import own_memory
from tools import bench_dit_split
from tools.bench_dit_parts import Setup, attention_table, config_of, kernel_sweep
from tools.gpu_timing import WARM_SECONDS, Card, Timing, in_turns, machine_lines, milliseconds, synchronize
from tools.random_weights import law

SIZES = {
    "480p": (21, 60, 104), "720p": (21, 90, 160), "256": (1, 32, 32), "1560": (1, 60, 104), "7800": (5, 60, 104),
}  # fmt: skip
"""Latent frames, height and width: 81 frames of 832x480 and of 1280x720, and clips of so many tokens."""
ROUNDS = {("1.3b", "480p"): 9, ("14b", "480p"): 5, ("14b", "720p"): 2}
LONG = {("14b", "720p")}
"""Forwards of 10 s and more: only what the goals compare, and no turn to warm up after the first calls."""
TIMESTEP = 637
PROMPT_ROWS = 60
MUST = {("1.3b", "480p"): (1.37, 1.13), ("14b", "480p"): (1.28, 1.10), ("14b", "720p"): (1.26, 1.12)}
"""Ratios to reach: against Diffusers with cuDNN's attention, and compiled."""
MUST_SMALL = 10.0
MUST_ERROR = 6e-3


class Inputs(NamedTuple):
    latents: Tensor
    """[1, C, T, H, W] float32."""
    prompt: Tensor
    """[1, text_len, text_dim] float32, of numbers that bfloat16 holds."""
    timestep: Tensor


def make_inputs(config: TransformerConfig, size: str, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    shape = SIZES[size] if device.startswith("cuda") else (3, 8, 8)
    latents = torch.randn(1, config.in_channels, *shape, generator=generator, device=device)
    prompt = torch.zeros(1, config.text_len, config.text_dim, device=device)
    rows = torch.randn(PROMPT_ROWS, config.text_dim, generator=generator, device=device)
    prompt[:, :PROMPT_ROWS] = rows.bfloat16().float()
    return Inputs(latents.bfloat16().float(), prompt, torch.tensor([TIMESTEP], device=device))


def random_state(model: WanTransformer, device: str) -> dict[str, Tensor]:
    """Weights as a dit has them: bfloat16 but for those that stay float32, all of numbers that bfloat16 holds; those of
    q, k and v together."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = {
        name: (torch.float32 if keeps_float32(name) else torch.bfloat16, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    allocate = own_memory(shapes, model.runs(), device)
    state = {}
    for name, (dtype, shape) in shapes.items():
        mean, std = law(name, shape)
        values = torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean)
        state[name] = allocate(name, shape, dtype).copy_(values.bfloat16())
    return state


def our_model(config: TransformerConfig, state: Mapping[str, Tensor], compute: Compute) -> WanTransformer:
    with torch.device("meta"):
        model = WanTransformer(config)
    model.load_state_dict(state, assign=True)
    model.fuse()
    model.compute = compute
    return model.eval().requires_grad_(False)


def diffusers_model(config: TransformerConfig, state: Mapping[str, Tensor], device: str) -> nn.Module:
    """Of the same memory, with the dtypes that `from_pretrained(torch_dtype=torch.bfloat16)` gives."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    fields = {name: getattr(config, name) for name in config.__struct_fields__ if name not in ("text_len", "image_dim")}
    with torch.device("meta"):
        model = WanTransformer3DModel(**fields)
    model.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    exact = set(model._keep_in_fp32_modules)
    kept = {
        name: tensor.to(torch.float32 if exact & set(name.split(".")) else torch.bfloat16)
        for name, tensor in state.items()
    }
    model.load_state_dict(kept, assign=True)
    return model.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def cudnn_attention(device: str) -> Iterator[None]:
    """torch's attention is cuDNN's, whatever it would choose."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if device.startswith("cuda") else contextlib.nullcontext():
        yield


def default_is_cudnn(config: TransformerConfig, tokens: int, device: str) -> bool:
    """Whether torch, left to itself, takes cuDNN's attention for so many tokens."""
    if not device.startswith("cuda"):
        return True
    shape = (1, config.num_attention_heads, tokens, config.attention_head_dim)
    q = torch.randn(shape, device=device).bfloat16()
    with cudnn_attention(device):
        expected = F.scaled_dot_product_attention(q, q, q)
    return torch.equal(F.scaled_dot_product_attention(q, q, q), expected)


def compute_for(setup: Setup, config: TransformerConfig) -> Compute:
    """What a dit would take here; said aloud."""
    device = torch.device(setup.device)
    case = Case(device, torch.bfloat16, config.attention_head_dim)
    attention = choose(setup.attention, case, config.num_attention_heads)
    kind, problem = kernels.choose("auto", device, torch.bfloat16, config.num_attention_heads, case.head_dim)
    setup.say(f"ours: attention {attention}, kernels {kind}{f' ({problem})' if problem else ''}")
    return Compute(attention, kind)


class Ours:
    """One forward as it is served."""

    def __init__(self, model: WanTransformer, inputs: Inputs) -> None:
        self.model = model
        self.latents, self.rope = inputs.latents, model.rope(*inputs.latents.shape[2:])
        self.prompt, self.time = model.encode_prompt(inputs.prompt), model.encode_time(inputs.timestep)
        self.graphs = Graphs()

    @torch.inference_mode()
    def eager(self) -> Tensor:
        return self.model.velocity(self.latents, self.time, self.prompt, self.rope)

    @torch.inference_mode()
    def graph(self) -> Tensor:
        inputs = (self.latents, *self.time, self.prompt, self.rope, None)
        return self.graphs.run("bench", functools.partial(sampling.branches, self.model), inputs)

    def served(self) -> Tensor:
        small = self.latents.is_cuda and len(self.rope) <= sampling.GRAPH_TOKENS
        return self.graph() if small else self.eager()


def forward(setup: Setup, name: str, size: str) -> None:
    """Ours and Diffusers' in turns."""
    config, device = config_of(name, setup.device), setup.device
    with torch.device("meta"):
        shell = WanTransformer(config)
    state = random_state(shell, device)
    inputs = make_inputs(config, size, device)
    ours = Ours(our_model(config, state, compute_for(setup, config)), inputs)
    theirs = diffusers_model(config, state, device)
    half = (inputs.latents.bfloat16(), inputs.timestep, inputs.prompt.bfloat16())

    def call(model: nn.Module, cudnn: bool) -> Tensor:
        with cudnn_attention(device) if cudnn else contextlib.nullcontext():
            return model(*half, return_dict=False)[0]

    variants: dict[str, Callable[[], Tensor]] = {
        "ours": ours.served,
        "diffusers, cuDNN": lambda: call(theirs, True),
    }
    if default_is_cudnn(config, len(ours.rope), device):
        setup.say("diffusers, default: torch takes the same attention there; left out")
    else:
        variants["diffusers, default"] = lambda: call(theirs, False)
    if len(ours.rope) <= sampling.GRAPH_TOKENS:
        variants["ours, no graph"] = ours.eager
    if ours.model.compute.attention != "cudnn" and device.startswith("cuda") and (name, size) not in LONG:
        other = Ours(our_model(config, state, ours.model.compute._replace(attention="cudnn")), inputs)
        variants["ours, cuDNN"] = other.served
    if setup.compiled:
        compiled = diffusers_model(config, state, device)
        for block in compiled.blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)  # type: ignore[operator]
        variants["diffusers, compiled"] = lambda: call(compiled, True)
    _first_calls(setup, variants)
    tokens = len(ours.rope)
    small = tokens <= sampling.GRAPH_TOKENS
    rounds = setup.rounds or ROUNDS.get((name, size), 15 if small else 5)
    warm = None if (name, size) in LONG else WARM_SECONDS
    timed = in_turns(setup.card, variants, rounds, device, calls=10 if small else 1, warm=warm)
    setup.say(f"{name}, {tokens} tokens, {rounds} rounds:")
    for label, timing in timed.items():
        ratio = timing.median / timed["ours"].median
        setup.say(f"  {label:20} {timing}  {ratio:.3f} x ours")
    _judge(setup, name, size, timed)
    if small:
        setup.check(torch.equal(ours.served(), ours.eager()), "a replayed graph has the bits of the plain call")
    once = milliseconds(lambda: ours.model.encode_prompt(inputs.prompt), device)
    setup.say(f"  keys and values of one prompt, once per request: {once:.2f} ms")


def _first_calls(setup: Setup, variants: Mapping[str, Callable[[], Tensor]]) -> None:
    """Seconds of each first call, which compiles; and that all compute the same thing."""
    outputs = {}
    for label, call in variants.items():
        began = time.perf_counter()
        outputs[label] = call().float()
        synchronize(setup.device)
        setup.say(f"  first call of {label}: {time.perf_counter() - began:.1f} s")
    for label, output in outputs.items():
        distance = relative(output, outputs["ours"])
        setup.check(distance < 3e-2, f"{label} is {distance:.2e} from ours, expected less than 3e-2")


def _judge(setup: Setup, name: str, size: str, timed: Mapping[str, Timing]) -> None:
    if not setup.device.startswith("cuda"):
        return
    ratios = {label: timing.median / timed["ours"].median for label, timing in timed.items()}
    if (name, size) in MUST:
        eager, compiled = MUST[name, size]
        setup.check(ratios["diffusers, cuDNN"] >= eager, f"{ratios['diffusers, cuDNN']:.3f}x of eager, must {eager}")
        if "diffusers, compiled" in ratios:
            got = ratios["diffusers, compiled"]
            setup.check(got >= compiled, f"{got:.3f}x of compiled, must {compiled}")
    elif (name, size) == ("1.3b", "256"):
        got = min(ratio for label, ratio in ratios.items() if label in ("diffusers, cuDNN", "diffusers, default"))
        setup.check(got >= MUST_SMALL, f"{got:.1f}x of eager, must {MUST_SMALL}")


def split(setup: Setup, name: str, size: str) -> None:
    """Where the time of one forward of ours goes."""
    config, device = config_of(name, setup.device), setup.device
    with torch.device("meta"):
        shell = WanTransformer(config)
    ours = Ours(
        our_model(config, random_state(shell, device), compute_for(setup, config)), make_inputs(config, size, device)
    )
    bench_dit_split.report(setup, config, len(ours.rope), ours.eager, setup.rounds or ROUNDS[name, size])


def branches(setup: Setup, name: str) -> None:
    """Both branches of guidance as one forward and as two, with a graph and without; and that graphs keep the bits."""
    config, device = config_of(name, setup.device), setup.device
    with torch.device("meta"):
        shell = WanTransformer(config)
    model = our_model(config, random_state(shell, device), compute_for(setup, config))
    for shape in ((1, 32, 32), (1, 48, 64), (1, 60, 104), (2, 60, 104), (3, 60, 104), (5, 60, 104)):
        inputs = make_inputs(config, "256", device)
        small = shape if device.startswith("cuda") else (1, 4, 4)
        latents = torch.randn(1, config.in_channels, *small, device=device)
        prompts = torch.cat([model.encode_prompt(p) for p in (inputs.prompt, inputs.prompt.flip(2))], dim=2)
        rope, time_row = model.rope(*small), model.encode_time(inputs.timestep)
        given = (latents, *time_row, prompts, rope, None)

        def once(given: tuple[Any, ...] = given) -> Tensor:
            latents, embedding, modulation, prompts, rope, _ = given
            time_row = sampling.Time(embedding, modulation)
            return model.velocity(latents.expand(2, -1, -1, -1, -1), time_row, prompts, rope)

        def twice(given: tuple[Any, ...] = given) -> Tensor:
            latents, embedding, modulation, prompts, rope, _ = given
            time_row = sampling.Time(embedding, modulation)
            return torch.cat([model.velocity(latents, time_row, prompts[:, :, i : i + 1], rope) for i in range(2)])

        variants: dict[str, Callable[[], Tensor]] = {"one": once, "two": twice}
        if device.startswith("cuda"):
            graphs = Graphs()
            for label, function in list(variants.items()):
                bound = functools.partial(lambda function, *tensors: function(tensors), function)
                variants[f"{label}, graph"] = functools.partial(graphs.run, label, bound, given)
            for label, function in (("one", once), ("two", twice)):
                replayed = [variants[f"{label}, graph"]() for _ in range(3)]
                same = all(torch.equal(function(), output) for output in replayed)
                setup.check(same and len(graphs) > 0, f"{len(rope)} tokens, {label}: a replay has the bits of the call")
        timed = in_turns(setup.card, variants, setup.rounds or 9, device, calls=5, warm=3)
        times = ", ".join(f"{label} {timing.median:.2f} ms" for label, timing in timed.items())
        setup.say(f"{name}, {len(rope)} tokens, both branches: {times}")


def error(setup: Setup, name: str) -> None:
    """Distance of the velocity from float32, ours and Diffusers', and of two calls from each other."""
    config, device = config_of(name, setup.device), setup.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.device("meta"):
        shell = WanTransformer(config)
    state, inputs = random_state(shell, device), make_inputs(config, "7800", device)
    exact_model = our_model(config, {key: tensor.float() for key, tensor in state.items()}, Compute("math", "torch"))
    exact = Ours(exact_model, inputs).eager()
    del exact_model
    chosen = compute_for(setup, config)
    attentions: list[AttentionBackend] = [chosen.attention, "cudnn"] if device.startswith("cuda") else ["sdpa"]
    kinds: list[KernelKind] = list(dict.fromkeys([chosen.kernels, "torch"]))
    for attention in dict.fromkeys(attentions):
        for kind in kinds:
            ours = Ours(our_model(config, state, Compute(attention, kind)), inputs)
            output = ours.eager()
            distance = relative(output, exact)
            what = f"{name}, {len(ours.rope)} tokens, ours with {attention} and {kind}: {distance:.2e} from float32"
            setup.check(distance <= MUST_ERROR, what)
            setup.check(torch.equal(output, ours.eager()), "  and the same bits when called again")
    with cudnn_attention(device):
        half = (inputs.latents.bfloat16(), inputs.timestep, inputs.prompt.bfloat16())
        output = diffusers_model(config, state, device)(*half, return_dict=False)[0]
    setup.say(f"{name}, Diffusers in bfloat16: {relative(output, exact):.2e} from float32")


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


PARTS: dict[str, Callable[[Setup], None]] = {
    "attention": attention_table,
    "kernels": kernel_sweep,
    "error": lambda setup: error(setup, "1.3b"),
    **{
        f"{name}-{size}": functools.partial(forward, name=name, size=size)
        for name, size in (
            ("1.3b", "480p"), ("1.3b", "256"), ("1.3b", "1560"), ("1.3b", "7800"), ("14b", "480p"), ("14b", "720p"),
            ("14b", "256"), ("14b", "1560"),
        )
    },
    "split-1.3b": lambda setup: split(setup, "1.3b", "480p"),
    "split-14b": lambda setup: split(setup, "14b", "480p"),
    "branches-1.3b": lambda setup: branches(setup, "1.3b"),
    "branches-14b": lambda setup: branches(setup, "14b"),
}  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--attention", default="auto", help="backend of ours [auto]")
    parser.add_argument("--rounds", type=int, help="turns of each variant")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled Diffusers out")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(line.rstrip() + "\n")

    def check(passed: bool, what: str) -> None:
        say(f"{'ok  ' if passed else 'FAIL'} {what}")
        if not passed:
            failed.append(what)

    say(f"$ python -m tools.bench_dit {' '.join(sys.argv[1:])}")
    for line in machine_lines(device, "triton", "diffusers", "flash-attn-4"):
        say(line)
    with Card(device) as card:
        setup = Setup(device, say, check, card, args.attention, args.rounds, not args.no_compile)
        for part in args.parts:
            began = time.perf_counter()
            try:
                PARTS[part](setup)
            except Exception as problem:
                traceback.print_exc()
                check(False, f"{part}: {type(problem).__name__}: {str(problem)[:300]}")
            gc.collect()
            if device == "cuda":
                say(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            torch.compiler.reset()
            say(f"{part}: {time.perf_counter() - began:.0f} s")
    say(f"{len(failed)} checks failed")
    sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    # Not through the interpreter's end: inductor's worker processes would keep it waiting.
    os._exit(main())
