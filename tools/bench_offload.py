"""Weights in host memory against resident ones, network by network, on one GPU, in one process and in turns.

    python -m tools.bench_offload dit text switch                    # Wan2.1-T2V-14B, about 2 minutes
    python -m tools.bench_offload dit --model wan2.1-t2v-1.3b
    python -m tools.bench_offload diffusers                          # beside Diffusers' group offload with streams

All variants have the same random weights from the same shared, page-locked host memory. Resident, and with so many of
the blocks, as the stages have them (`stages/weights.py`). "peak" is what torch had allocated at most, plus what is
mapped behind descriptors: weights, activations, keys and values; not the CUDA context. Checks say `ok` or `FAIL`; the
exit status is 1 if one failed. On a machine without a GPU, a tiny model goes the same way.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from engine.models import load_model
from engine.params import ModelParams
from hotreload.device_placement import DevicePlacement
from hotreload.placement import Placement, Shapes
from ipc.messages.weights import WeightVersion
from stages import kernels
from stages.attention.backends import Case
from stages.attention.choice import choose
from stages.lanes import lane_of
from stages.models import text_encoder
from stages.models.blank import blank
from stages.models.text_encoder import TextEncoder, encode
from stages.models.transformer import Compute, WanTransformer, keeps_float32
from stages.offload import Pools
from stages.stage import Links
from stages.weights import Network, create, runs_of, shapes_of
from tools.bench_dit import diffusers_model, make_inputs
from tools.gpu_timing import Card, in_turns, machine_lines, milliseconds, synchronize
from tools.random_weights import law

MUST_SLOWER = 1.01
"""A forward of 81 frames, of the resident one."""
MUST_COPY = 1.03
"""A forward that is bound by the copy, of the bytes over the measured rate."""
MUST_SWITCH = 0.1
"""Seconds that are seen of a change of experts."""
MUST_TEXT = 0.35
"""Seconds that encoding may take longer."""
TOKENS = 60


class Setup(NamedTuple):
    model: ModelParams
    device: torch.device
    dtype: torch.dtype
    card: Card
    say: Callable[[str], None]
    check: Callable[[bool, str], None]

    @property
    def name(self) -> str:
        return str(self.device)

    def must(self, passed: bool, what: str) -> None:
        """A figure to be reached on a GPU; on a CPU it says nothing."""
        if self.device.type == "cuda":
            self.check(passed, what)
        else:
            self.say(f"     {what}")


class Held:
    """A network and its weights in shared host memory; `peak` is of the time since it was last asked."""

    def __init__(
        self, setup: Setup, module: Any, name: str, shapes: Shapes, host: Placement, aliases: Any = None
    ) -> None:
        self.setup = setup
        self.network: Network[Any] = Network(module, name, shapes, aliases or {}, "", setup.device, self._unlocked)
        self._host = host
        self.placed = 0
        """Bytes behind descriptors on the device."""

    def adopt(self, version: WeightVersion) -> None:
        self.network.adopt(version, self._host.fd)

    def offloaded(self, pools: Pools) -> Any:
        self.network.offload(pools, [])
        self.placed = 0
        return self.network.use("base")

    def resident(self) -> Any:
        self.network.onload(self._links(), [], outliving=self.setup.device.type == "cuda")
        return self.network.use("base")

    def _unlocked(self, component: str, content: str, why: str) -> None:
        self.setup.check(False, f"the pages of the {component} are locked: {why}")

    def _links(self) -> Links:
        def place(version: WeightVersion, device: str, fd: int) -> None:
            self.placed += version.bytes

        nothing: Any = None
        return Links({}, {}, None, lambda: None, nothing, {}, place, self._unlocked, nothing, nothing, nothing)


def fill(setup: Setup, name: str, shapes: Shapes, runs: Any) -> Placement:
    """Random weights in host memory; drawn on the device, which is faster."""
    began = time.perf_counter()
    host = Placement.create(name, shapes, runs)
    drawn = create(name, setup.name, shapes, runs)
    for tensor_name, tensor in drawn.tensors.items():
        mean, std = law(tensor_name, tuple(tensor.shape))
        tensor.normal_(mean, std)
    host.flat.copy_(drawn.flat[: len(host.flat)] if isinstance(drawn, DevicePlacement) else drawn.flat)
    drawn.close()
    setup.say(f"{name}: {host.table.size / 1e9:.1f} GB of random weights in {time.perf_counter() - began:.1f} s")
    return host


def rate(setup: Setup, host: Placement) -> float:
    """Bytes a second from page-locked shared memory to the device."""
    size = min(4 << 30, len(host.flat))
    target = torch.empty(size, dtype=torch.uint8, device=setup.device)
    source = host.flat[:size]
    lane = lane_of(setup.device)

    def copy() -> None:
        lane.wait(lane.copy([(target, source)], None))

    copy()
    return size / (min(milliseconds(copy, setup.name) for _ in range(3)) / 1000)


class Transformers:
    """Two transformers with the same weights, or experts with the same weights, and what they are called with."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.model.transformer
        with blank():
            modules = [WanTransformer(config) for _ in range(2)]
        shapes = shapes_of(modules[0], lambda n: torch.float32 if keeps_float32(n) else setup.dtype, {})
        self.host = fill(setup, "transformer", shapes, runs_of(modules[0]))
        version = self.host.seal("transformer", "base")
        attention = choose(
            "auto", Case(setup.device, setup.dtype, config.attention_head_dim), config.num_attention_heads
        )
        kind, _ = kernels.choose(
            "auto", setup.device, setup.dtype, config.num_attention_heads, config.attention_head_dim
        )
        self.held = []
        began = time.perf_counter()
        for module, name in zip(modules, ("transformer", "transformer_2"), strict=True):
            module.compute = Compute(attention, kind)
            held = Held(setup, module, name, shapes, self.host)
            held.adopt(msgspec.structs.replace(version, component=name))
            self.held.append(held)
        for held in self.held:
            held.network._on_host["base"].placement()
        setup.say(f"mapped, checked and page-locked twice, side by side, in {time.perf_counter() - began:.1f} s")
        self.pinned = self.held[0].network._on_host["base"].placement()
        self.rate = rate(setup, self.pinned)
        setup.say(f"copies: {self.rate / 1e9:.1f} GB/s")
        setup.say(f"attention {attention}, kernels {kind}")

    def call(self, model: WanTransformer, size: str) -> Callable[[], Tensor]:
        inputs = make_inputs(self.setup.model.transformer, size, self.setup.name)
        prompt = model.encode_prompt(inputs.prompt)
        time_row = model.encode_time(inputs.timestep)
        rope = model.rope(*inputs.latents.shape[2:])
        return lambda: model.velocity(inputs.latents, time_row, prompt, rope)

    def pools(self, resident: int | None) -> Pools:
        return Pools(self.setup.device, lane_of(self.setup.device), resident)


def peak_of(setup: Setup, call: Callable[[], object], placed: int) -> float:
    """GiB of one call."""
    if setup.device.type != "cuda":
        call()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(setup.name)
    return (torch.cuda.max_memory_allocated() + placed) / 2**30


@torch.inference_mode()
def bench_dit(setup: Setup, transformers: Transformers) -> None:
    resident, streamed = transformers.held
    for size, rounds in (("480p", 3), ("7800", 5)):
        pools = transformers.pools(0)
        calls = {"streamed": transformers.call(streamed.offloaded(pools), size)}
        peak = peak_of(setup, calls["streamed"], 0)
        resident.offloaded(transformers.pools(0))
        calls["resident"] = transformers.call(resident.resident(), size)
        setup.check(torch.equal(calls["resident"](), calls["streamed"]()), f"{size}: streamed has the bits of resident")
        timings = in_turns(setup.card, calls, rounds, setup.name, warm=5.0)
        for name, timing in timings.items():
            setup.say(f"  {size} {name:10} {timing}")
        ratio = timings["streamed"].median / timings["resident"].median
        moved = pools._pools["blocks"]._layout.size * setup.model.transformer.num_layers
        bound = moved / transformers.rate
        setup.say(f"  {size} blocks: {moved / 1e9:.2f} GB a forward, {1000 * bound:.1f} ms at the measured rate")
        line = f"{size}: streamed takes {ratio:.4f} of resident, peak {peak:.2f} GiB"
        if bound * 1000 < timings["resident"].median:
            setup.must(ratio <= MUST_SLOWER, f"{line}; at most {MUST_SLOWER}")
        else:
            over = timings["streamed"].median / 1000 / bound
            setup.must(over <= MUST_COPY, f"{line}, {over:.3f} of the copy's time; at most {MUST_COPY}")
        del calls, pools
        gc.collect()
    layers = setup.model.transformer.num_layers
    for count in (layers // 4, layers // 2, layers):
        pools = transformers.pools(count)
        call = transformers.call(streamed.offloaded(pools), "7800")
        call()
        peak = peak_of(setup, call, 0)
        least = min(milliseconds(call, setup.name) for _ in range(3))
        setup.say(f"  7800 with {count} of {layers} blocks resident: {least:.1f} ms, peak {peak:.2f} GiB")
    resident.offloaded(transformers.pools(0))
    streamed.offloaded(transformers.pools(0))


@torch.inference_mode()
def bench_switch(setup: Setup, transformers: Transformers) -> None:
    """From the one expert to the other: what of it is seen, with their blocks in rooms that both use."""
    high, low = transformers.held
    for resident in (None, 0):
        pools = transformers.pools(resident)
        for held in transformers.held:
            held.offloaded(pools)
        first = transformers.call(high.network.use("base"), "480p")
        first()
        usual = min(milliseconds(first, setup.name) for _ in range(2))

        def last(pools: Pools = pools, first: Callable[[], Tensor] = first) -> Callable[[], Tensor]:
            with pools.lane.aside():
                second = transformers.call(low.network.use("base"), "480p")
                made = pools.lane.computed()
            pools.follow("blocks", low.network.bound_source, 1)
            first()
            pools.lane.wait(made)
            return second

        def both(last: Callable[[], Callable[[], Tensor]] = last) -> None:
            last()()

        seen = (milliseconds(both, setup.name) - 2 * usual) / 1000
        what = "all of one expert's blocks" if resident is None else "two blocks"
        setup.say(f"  {what} on the device: a forward {usual:.1f} ms")
        setup.must(
            seen <= MUST_SWITCH,
            f"a change of experts, keys and values too, is seen for {seen:.3f} s; at most {MUST_SWITCH}",
        )


@torch.inference_mode()
def bench_text(setup: Setup) -> None:
    config = setup.model.text_encoder
    with blank():
        modules: list[TextEncoder] = [text_encoder.build(config) for _ in range(2)]
    shapes = shapes_of(modules[0], lambda name: setup.dtype, text_encoder.ALIASES)
    host = fill(setup, "text_encoder", shapes, ())
    version = host.seal("text_encoder", "base")
    resident, streamed = [Held(setup, m, "text_encoder", shapes, host, text_encoder.ALIASES) for m in modules]
    for held in (resident, streamed):
        held.adopt(version)
        held.offloaded(Pools(setup.device, lane_of(setup.device), 0))
    resident.resident()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, config.vocab_size, (TOKENS,), generator=generator).tolist() for _ in range(2)]

    def call(held: Held) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            rows = encode(held.network.use("base"), *texts)
            held.network.release()
            return rows

        return run

    calls = {"resident": call(resident), "streamed": call(streamed)}
    same = all(torch.equal(a, b) for a, b in zip(calls["resident"](), calls["streamed"](), strict=True))
    setup.check(same, "text encoder: streamed has the bits of resident")
    peak = peak_of(setup, calls["streamed"], 0)
    timings = in_turns(setup.card, calls, 5, setup.name, warm=2.0)
    for name, timing in timings.items():
        setup.say(f"  two texts of {TOKENS} tokens, {name:10} {timing}")
    more = (timings["streamed"].median - timings["resident"].median) / 1000
    setup.check(
        more <= MUST_TEXT, f"text encoder: {more:.3f} s more from the host, peak {peak:.2f} GiB; at most {MUST_TEXT}"
    )


@torch.inference_mode()
def bench_diffusers(setup: Setup, transformers: Transformers) -> None:
    """Diffusers' group offload of the same weights: a block to a group, a stream, page-locked copies of its own."""
    began = time.perf_counter()
    model: Any = diffusers_model(setup.model.transformer, dict(transformers.host.tensors), "cpu")
    model.enable_group_offload(
        onload_device=setup.device, offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1, use_stream=True,
    )  # fmt: skip
    setup.say(f"diffusers: group offload set up in {time.perf_counter() - began:.1f} s")
    held = transformers.held[1]
    for size in ("480p", "7800"):
        inputs = make_inputs(setup.model.transformer, size, setup.name)
        latents, prompt = inputs.latents.to(setup.dtype), inputs.prompt.to(setup.dtype)

        def theirs(latents: Tensor = latents, prompt: Tensor = prompt, inputs: Any = inputs) -> Tensor:
            made: Tensor = model(latents, timestep=inputs.timestep, encoder_hidden_states=prompt, return_dict=False)[0]
            return made

        ours = transformers.call(held.offloaded(transformers.pools(0)), size)
        calls = {"ours": ours, "diffusers": theirs}
        theirs()
        peaks = {name: peak_of(setup, call, 0) for name, call in calls.items()}
        timings = in_turns(setup.card, calls, 2 if size == "480p" else 3, setup.name, warm=None)
        for name, timing in timings.items():
            setup.say(f"  {size} {name:10} {timing}, peak {peaks[name]:.2f} GiB")
        setup.say(f"  {size}: diffusers takes {timings['diffusers'].median / timings['ours'].median:.2f} times as long")


PARTS = ("dit", "switch", "text", "diffusers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", help="[wan2.1-t2v-14b; without a GPU wan-demo]")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    failed: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(line + "\n")

    def check(passed: bool, what: str) -> None:
        say(f"{'ok  ' if passed else 'FAIL'} {what}")
        if not passed:
            failed.append(what)

    say(f"$ python -m tools.bench_offload {' '.join(sys.argv[1:])}")
    for line in machine_lines(str(device), "diffusers", "flash-attn-4"):
        say(line)
    model = load_model(args.model or ("wan2.1-t2v-14b" if on_gpu else "wan-demo"))
    with Card(str(device)) as card:
        setup = Setup(model, device, torch.bfloat16 if on_gpu else torch.float32, card, say, check)
        if set(args.parts) - {"text"}:
            transformers = Transformers(setup)
            for name, run in (("dit", bench_dit), ("switch", bench_switch), ("diffusers", bench_diffusers)):
                if name in args.parts:
                    began = time.perf_counter()
                    run(setup, transformers)
                    say(f"{name}: {time.perf_counter() - began:.0f} s")
        if "text" in args.parts:
            bench_text(setup)
    say(f"{len(failed)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
