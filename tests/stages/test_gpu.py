"""The networks on CUDA against the same weights in float32 on the CPU."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from engine.models import list_models, load_model
from engine.params import Limits, ModelParams
from hotreload.checkpoint import open_checkpoint
from hotreload.reading import BUFFERS
from hotreload.weights import load_weights
from ipc.messages.reports import QuantumDone
from ipc.messages.stage import Begin, Run
from ipc.tensor_queue import TensorQueue
from stages import kernels
from stages.attention import choice
from stages.attention.backends import Case
from stages.graphs import Graphs
from stages.leaving import Leaving
from stages.loop import limit_memory
from stages.models import text_encoder
from stages.models.image_encoder import ImageEncoder
from stages.models.transformer import Block, Compute, Stream, WanTransformer, keeps_float32
from stages.models.vae import WanVae
from stages.sampling import Context, get_noise, predict
from tests.stages.process import WorkerProcess
from tests.stages.rig import Rig, make_job
from tests.stages.test_vae import take
from tools.make_checkpoint import TOKENIZER, make_checkpoint, shrink

pytestmark = pytest.mark.gpu

MODELS = [name for name in list_models() if name != "wan-demo"]
IDS = [5, 60, 211, 17, 340, 1]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32: float32 on the GPU is compared with float32 on the CPU."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = matmul


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ModelParams, Path]]:
    """A shrunken model and its checkpoint, float32 on the disk; made when first asked for."""
    root = tmp_path_factory.mktemp("tiny")

    def make(name: str) -> tuple[ModelParams, Path]:
        model = shrink(load_model(name))
        if not (root / name).is_dir():
            make_checkpoint(model, root / name, "diffusers", dtype=torch.float32)
        return model, root / name

    return make


def load(
    network: Callable[[], nn.Module],
    directory: Path,
    component: str,
    device: str,
    dtype: Callable[[str], torch.dtype] = lambda name: torch.float32,
) -> tuple[nn.Module, str]:
    """The network with a component's weights, and their content hash."""
    with torch.device("meta"):
        module = network()
    experts = ("transformer_2",) if (directory / "transformer_2").is_dir() else ()
    found = open_checkpoint(directory, (component, *experts)).components[component]
    aliases = text_encoder.ALIASES if component == "text_encoder" else None
    return module, load_weights(module, found, device=device, dtype=dtype, aliases=aliases)


def mixed(name: str) -> torch.dtype:
    """As the dit stage loads a transformer on a GPU."""
    return torch.float32 if keeps_float32(name) else torch.bfloat16


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.cpu().double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
def velocity(dit: WanTransformer, model: ModelParams, device: str) -> Tensor:
    """At normal latents of 5x16x16, for a prompt of six rows; the first frame at timestep 0 where models do that."""
    generator = torch.Generator().manual_seed(0)
    t = model.transformer
    latents = torch.randn(1, t.in_channels, 5, 16, 16, generator=generator).to(device)
    prompt = torch.zeros(1, t.text_len, t.text_dim)
    prompt[:, :6] = torch.randn(6, t.text_dim, generator=generator)
    image = None
    if model.image_encoder is not None:
        tokens = torch.randn(1, model.image_encoder.tokens, model.image_encoder.hidden_size, generator=generator)
        image = dit.encode_image(tokens.to(device))
    time = torch.tensor([[0, 637]] if model.conditioning == "first_frame" else [637], device=device)
    return dit(latents, time, dit.encode_prompt(prompt.to(device)), dit.rope(5, 16, 16), image)


@pytest.mark.parametrize("name", MODELS)
def test_the_transformer_in_bfloat16(name: str, tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """Every model's DiT on CUDA as it is served, against float32 on the CPU: at most 6e-3 apart. In float32: 1e-5."""
    model, directory = tiny(name)
    expected, exact, half = (
        velocity(load(lambda: WanTransformer(model.transformer), directory, "transformer", *where)[0], model, where[0])  # type: ignore[arg-type]
        for where in (("cpu",), ("cuda",), ("cuda", mixed))
    )
    assert relative(exact, expected) <= 1e-5
    assert relative(half, expected) <= 6e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_transformer_as_it_is_served(name: str, tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """Every model's DiT in bfloat16 with the attention and the kernels that this device gets, against float32 on the
    CPU: at most 6e-3 apart, and no further than with plain torch by more than a rounding; the same bits each time."""
    model, directory = tiny(name)
    config, device = model.transformer, torch.device("cuda")
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    expected, plain, dit = (
        load(lambda: WanTransformer(config), directory, "transformer", *where)[0]  # type: ignore[arg-type]
        for where in (("cpu",), ("cuda", mixed), ("cuda", mixed))
    )
    kind, problem = kernels.choose("auto", device, torch.bfloat16, heads, head_dim)
    assert kind == "triton", problem
    dit.compute = Compute(choice.choose("auto", Case(device, torch.bfloat16, head_dim), heads), kind)
    exact = velocity(expected, model, "cpu")
    served, again, without = (velocity(network, model, "cuda") for network in (dit, dit, plain))
    assert torch.equal(served, again)
    assert relative(served, exact) <= min(6e-3, 1.5 * relative(without, exact))


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.2-ti2v-5b"])
@torch.inference_mode()
def test_a_graph_has_the_bits_of_the_plain_call(name: str, tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """Guided steps of two requests in turns, with graphs and without: the same bits at every step, whether it was
    called, recorded or replayed; two graphs are kept at most if two are allowed, and those that went are made again."""
    model, directory = tiny(name)
    dit, _ = load(lambda: WanTransformer(model.transformer), directory, "transformer", "cuda", mixed)
    assert isinstance(dit, WanTransformer)
    dit.compute = Compute("math", "triton")
    graphs = Graphs(limit=2)
    requests = [
        guided_request(dit, model, size, seed) for size, seed in (((5, 16, 16), 1), ((3, 8, 8), 2), ((5, 16, 16), 3))
    ]
    for index in (0, 1, 2, 1, 0):
        for latents, context in requests:
            plain = predict(dit, latents, index, context, 5.0)
            run = functools.partial(graphs.run, "key")
            assert torch.equal(predict(dit, latents, index, context, 5.0, run=run), plain)
    assert len(graphs) == 2
    latents, context = guided_request(dit, model, (1, 8, 8), 4)
    for _ in range(3):
        predict(dit, latents, 0, context, 5.0, run=functools.partial(graphs.run, "key"))
    assert len(graphs) == 2


def test_what_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """A function that waits for the GPU: its result all the same, each time; one line says so, and the next function is
    recorded."""
    graphs, x = Graphs(), torch.arange(4.0, device="cuda")

    def waits(x: Tensor) -> Tensor:
        return x * float(x.sum())

    for _ in range(4):
        assert torch.equal(graphs.run("waits", waits, (x,)), 6 * x)
    assert len(graphs) == 0
    assert [record.message for record in caplog.records if "no CUDA graph" in record.message][1:] == []
    for number in range(4):
        assert torch.equal(graphs.run("adds", lambda x: x + 1, (x + number,)), x + number + 1)
    assert len(graphs) == 1


def guided_request(
    dit: WanTransformer, model: ModelParams, size: tuple[int, int, int], seed: int
) -> tuple[Tensor, Context]:
    """Latents [C, T, H, W] and what is made once of two prompts, for three steps."""
    generator = torch.Generator("cuda").manual_seed(seed)
    t = model.transformer
    latents = torch.randn(t.in_channels, *size, generator=generator, device="cuda")
    prompts = torch.randn(2, 1, t.text_len, t.text_dim, generator=generator, device="cuda")
    image = None
    if model.image_encoder is not None:
        shape = (1, model.image_encoder.tokens, model.image_encoder.hidden_size)
        image = dit.encode_image(torch.randn(shape, generator=generator, device="cuda"))
    times = dit.encode_time(torch.tensor([999, 700, 300], device="cuda"))
    both = torch.cat([dit.encode_prompt(prompt) for prompt in prompts], dim=2)
    return latents, Context(both, dit.rope(*size), times, image)


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
@torch.inference_mode()
def test_the_vae_in_float32(name: str, tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """Both VAEs on CUDA against the CPU, encode and decode, whole and in chunks: at most 1e-4 apart."""
    model, directory = tiny(name)
    generator = torch.Generator().manual_seed(0)
    side = 4 * model.vae.spatial_stride
    frames = torch.rand(1, 3, 9, side, side, generator=generator) * 2 - 1
    latents = torch.randn(1, model.vae.z_dim, 3, 4, 4, generator=generator)
    cpu, gpu = (load(lambda: WanVae(model.vae), directory, "vae", device)[0] for device in ("cpu", "cuda"))
    assert isinstance(cpu, WanVae)
    assert isinstance(gpu, WanVae)
    encoded, decoded = cpu.encode(frames), cpu.decode(latents)
    assert relative(gpu.encode(frames.cuda()), encoded) <= 1e-4
    assert relative(gpu.decode(latents.cuda()), decoded) <= 1e-4
    cache: dict[str, Tensor] = {}
    chunks = [gpu.decode_chunk(latents[:, :, i : i + 1].cuda(), cache) for i in range(3)]
    assert relative(torch.cat(chunks, dim=2), decoded) <= 1e-4


def test_the_text_encoder_in_bfloat16(tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """UMT5 on CUDA against float32 on the CPU: 1e-5 apart in float32, at most 2e-2 in bfloat16, which rounds every
    residual."""
    model, directory = tiny("wan2.1-t2v-1.3b")
    expected, exact, half = (
        text_encoder.encode(
            load(lambda: text_encoder.build(model.text_encoder), directory, "text_encoder", *where)[0],  # type: ignore[arg-type]
            IDS,
        )[0]
        for where in (("cpu",), ("cuda",), ("cuda", lambda name: torch.bfloat16))
    )
    assert relative(exact, expected) <= 1e-5
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) <= 2e-2


@torch.inference_mode()
def test_the_image_encoder(tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """CLIP's tower on CUDA against the CPU in float32: at most 1e-5 apart."""
    model, directory = tiny("wan2.1-i2v-14b-480p")
    config = model.image_encoder
    assert config is not None
    picture = torch.randn(1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    cpu, gpu = (load(lambda: ImageEncoder(config), directory, "image_encoder", device)[0] for device in ("cpu", "cuda"))
    assert relative(gpu(picture.cuda()), cpu(picture)) <= 1e-5


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.1-t2v-1.3b"])
@torch.inference_mode()
def test_a_block_keeps_what_it_needs_and_no_more(name: str) -> None:
    """At full size: the stream, and at the attention q, k, v and its result, or at the feed-forward the hidden layer
    and one activation, whichever is more. `engine/footprint.py` counts with that, and a twentieth for the allocator."""
    config, tokens = load_model(name).transformer, 16384
    with torch.device("cuda"):
        block = Block(config).to(torch.bfloat16)
        modulation, rope = torch.randn(1, 1, 6, config.dim), torch.zeros(tokens, config.attention_head_dim // 2, 2)
        text = torch.randn(2, 1, 512, config.num_attention_heads, config.attention_head_dim).bfloat16()
    compute = Compute("sdpa", "triton")
    for _ in range(2):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stream = Stream(torch.randn(1, tokens, config.dim, device="cuda"))
        stream = block(stream, modulation, text, rope, None, compute)
        stream = block(stream, modulation, text, rope, None, compute)
        peak = torch.cuda.max_memory_allocated() - before
        del stream
    needed = tokens * max(12 * config.dim, 6 * config.dim + 2 * config.ffn_dim)
    assert needed <= peak <= 1.05 * needed, f"{peak / tokens / config.dim:.2f} bytes per token and unit of the width"


def test_weights_on_cuda_are_those_on_the_cpu(tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """A float32 checkpoint streamed to CUDA and cast there to bfloat16 has the bits of the cast on the CPU and the same
    content hash; beyond the weights, the GPU held the buffers of the stream and no more."""
    model, directory = tiny("wan2.2-ti2v-5b")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gpu, gpu_hash = load(lambda: WanTransformer(model.transformer), directory, "transformer", "cuda", mixed)
    peak = torch.cuda.max_memory_allocated() - before
    cpu, cpu_hash = load(lambda: WanTransformer(model.transformer), directory, "transformer", "cpu", mixed)
    assert gpu_hash == cpu_hash
    expected = cpu.state_dict()
    for key, tensor in gpu.state_dict().items():
        assert tensor.is_cuda
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor.cpu(), expected[key]), key
    rounded = sum(512 * (1 + tensor.nbytes // 512) for tensor in expected.values())
    assert peak <= rounded + 3 * BUFFERS * (8 << 20)


def test_noise_on_cuda_is_another_stream() -> None:
    """The same seed on CUDA gives the same noise twice, and not that of the CPU; both are standard normal."""
    shape = (16, 5, 16, 16)
    first, again, cpu = (get_noise(7, shape, device) for device in ("cuda", "cuda", "cpu"))
    assert torch.equal(first, again)
    assert not torch.equal(first.cpu(), cpu)
    assert abs(float(first.mean())) < 0.05
    assert abs(float(first.std()) - 1) < 0.05


def test_a_process_that_rests_keeps_no_memory_for_later(tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """A dit process denoises 81 frames of 480p with a tiny model, one step and then nothing: what its allocator had
    taken for that is free for other processes when the step is reported, but for what the task still needs."""
    model, directory = tiny("wan2.1-t2v-1.3b")
    model = msgspec.structs.replace(model, limits=Limits(max_pixels=480 * 832, max_frames=81))
    shutil.copytree(TOKENIZER, directory / "tokenizer", dirs_exist_ok=True)
    job = make_job(height=480, width=832, num_frames=81)
    devices: dict[str, Any] = {"dtype": "bfloat16", "devices": {"text": "cuda:0", "dit": "cuda:0"}}
    with Rig(directory, model) as rig, WorkerProcess(rig, ("text",), **devices) as text:
        text.ready()
        text.tell(Begin(stage="text", job=job))
        assert isinstance(text.ask(Run(id=job.id, phase="text", index=0)), QuantumDone)
        with WorkerProcess(rig, ("dit",), **devices) as dit:
            dit.ready()
            dit.tell(Begin(stage="dit", job=job))
            before = torch.cuda.mem_get_info()[0]
            assert isinstance(dit.ask(Run(id=job.id, phase="denoise", index=0)), QuantumDone)
            kept = before - torch.cuda.mem_get_info()[0]
    assert kept < 256 << 20


def test_a_process_allocates_no_more_than_it_may() -> None:
    """Within the bound as usual; beyond it, out of memory, though the GPU has it; and then as before."""
    bound = torch.cuda.memory_reserved() + (256 << 20)
    torch.cuda.empty_cache()
    try:
        limit_memory("cuda:0", ["text", "dit"], {"text": 1 << 20, "dit": bound, "vae": 1 << 40})
        small = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(bound, dtype=torch.uint8, device="cuda")
        assert small.numel() == 64 << 20
    finally:
        limit_memory("cuda:0", ["dit"], {"dit": 1 << 50})
    assert torch.empty(bound, dtype=torch.uint8, device="cuda").numel() == bound


def test_frames_leave_the_gpu_while_it_computes(tiny: Callable[[str], tuple[ModelParams, Path]]) -> None:
    """A tensor is made, and then the GPU is given something to do for a second: another thread has the tensor in the
    queue, in host memory and right, long before that is over."""
    model, directory = tiny("wan2.1-t2v-1.3b")
    with Rig(directory, model) as rig, ThreadPoolExecutor(1) as thread:
        queue, job = rig.memory.queues["frames"], make_job()
        with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
            frames = torch.arange(3 * 16 * 16 * 3, device="cuda").remainder(251).to(torch.uint8).reshape(3, 16, 16, 3)
            leaving = Leaving(producer, job.id, 0, frames, 1.0)
            torch.cuda._sleep(int(1.5e9))
            busy = torch.cuda.current_stream().record_event()
            copied = thread.submit(leaving).result()
            assert not busy.query(), "the copy waited for what was computed after it"
            assert copied is not None and copied.bytes == frames.nbytes
        assert torch.equal(take(rig, "frames", job), frames.cpu())
