"""What a request is said to need at each memory level."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from engine import footprint, models
from engine.footprint import (
    Account,
    Bounds,
    RequestSize,
    Setting,
    allocation_limits,
    break_even_tokens,
    clip_bytes,
    forward_flops,
    measured,
    need,
    needs,
    plan_for,
    plans,
    refusal,
    resident_dit,
    smaller_sizes,
    tokens_of,
    usual_size,
    vae_working_bytes,
)
from engine.memory import device_sizes
from engine.models import list_models, load_model
from engine.params import ModelParams
from engine.weight_sizes import component_bytes, transformer_bytes
from ipc.errors import BadConfig
from ipc.messages.memory import MemoryPlan

GIB = 2**30
LARGE = "wan2.1-t2v-14b"
USUAL = RequestSize(832, 480, 81)
FLOAT32_CPU = Setting(dtype="float32", processes=0, queues=False)


@st.composite
def sizes(draw: st.DrawFn, name: str = LARGE) -> RequestSize:
    """What the model's limits allow."""
    model = load_model(name)
    multiple, most = model.size_multiple, model.limits
    width = multiple * draw(st.integers(1, 1280 // multiple))
    height = multiple * draw(st.integers(1, most.max_pixels // width // multiple))
    frames = 4 * draw(st.integers(0, (most.max_frames - 1) // 4)) + 1
    return RequestSize(width, height, frames, draw(st.booleans()))


def test_every_figure_names_its_source() -> None:
    """And is positive; a source that is a file of this repository is there."""
    root = Path(models.__file__).resolve().parent.parent
    for name, figure in msgspec.structs.asdict(measured()).items():
        if name == "gpu":
            continue
        assert figure.value > 0 and figure.source, name
        for word in figure.source.replace(",", " ").replace(":", " ").split():
            assert not word.startswith("docs/") or (root / word).is_file(), (name, word)


def test_a_figure_that_is_missing_or_misspelt_is_named(tmp_path: Path) -> None:
    text = (models.CONFIGS / "measured" / "memory.yaml").read_text()
    (tmp_path / "memory.yaml").write_text(text.replace("dit_width_bytes", "dit_with_bytes"))
    with pytest.raises(BadConfig, match=r"memory\.yaml.*dit_wi"):
        models.read_yaml(tmp_path / "memory.yaml", footprint.Measured)


@pytest.mark.parametrize("name", list_models())
def test_levels_of_a_usual_request(name: str) -> None:
    """Each level takes no more of the GPU than the one below; from level 1 on the clip is in host memory between the
    VAE's tiles, from level 2 on all weights are, too; only level 3 can be slower, and not with all blocks resident."""
    model = load_model(name)
    found = needs(model, usual_size(model))
    assert [n.level for n in found] == [0, 1, 2, 3]
    assert [n.gpu for n in found] == sorted((n.gpu for n in found), reverse=True)
    weights = sum(component_bytes(model, "bfloat16").values())
    clip = clip_bytes(model, usual_size(model), "bfloat16")
    assert [n.host for n in found] == [0, 0, weights, weights]
    assert [n.host_all for n in found] == [0, clip, clip + weights, clip + weights] and clip > 0
    assert [n.slowdown for n in found[:3]] == [1.0] * 3 and found[3].slowdown >= 1.0
    everything = need(model, usual_size(model), MemoryPlan(level=3, blocks=model.transformer.num_layers))
    assert everything.slowdown == 1.0


@pytest.mark.parametrize("name", list_models())
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_more_of_anything_never_takes_less(name: str, data: st.DataObject) -> None:
    """A larger frame, more frames, guidance, more resident blocks."""
    model, size = load_model(name), data.draw(sizes(name))
    larger = msgspec.structs.replace(size, width=size.width + model.size_multiple, frames=size.frames + 4, guided=True)
    for plan in plans(model):
        assert need(model, size, plan).gpu <= need(model, larger, plan).gpu
    account = [need(model, size, plan) for plan in plans(model) if plan.level == 3]
    assert [n.gpu for n in account] == sorted((n.gpu for n in account), reverse=True)
    assert [n.slowdown for n in account] == sorted(n.slowdown for n in account)


def test_what_level_2_leaves_on_the_gpu() -> None:
    """Of Wan2.2-A14B's two experts the blocks of one, without what makes keys and values, and no text encoder;
    contexts, queues, and a request's activations, with the keys and values of both experts while they change."""
    model = load_model("wan2.2-t2v-a14b")
    parts, figures = transformer_bytes(model.transformer, "bfloat16"), measured()
    beside = int(3 * figures.context_bytes.value) + sum(device_sizes(model).values())
    resident = parts.layers * parts.block + parts.rest
    forward = footprint.dit_bytes(model, USUAL, "bfloat16", away=True, ahead=True)
    assert need(model, USUAL, MemoryPlan(level=2)).gpu == beside + resident + forward
    keys = footprint.keys_bytes(model, USUAL, "bfloat16")
    assert keys == 2 * 40 * 2 * 512 * 5120 * 2
    alone = footprint.dit_bytes(load_model(LARGE), USUAL, "bfloat16", away=True)
    assert forward - alone == 2 * keys + parts.embedder + 2 * parts.cross
    levels = {blocks: need(model, USUAL, MemoryPlan(level=3, blocks=blocks)).gpu for blocks in (0, 1)}
    assert levels[1] - levels[0] == parts.block + forward - alone, "with no block, nothing is made for the next expert"


def test_what_level_3_leaves_on_the_gpu() -> None:
    """A block more is its bytes more; with none there are two rooms, with all none to spare."""
    model = load_model(LARGE)
    block = transformer_bytes(model.transformer, "bfloat16").block
    none, one, most, every = (need(model, USUAL, MemoryPlan(level=3, blocks=n)).gpu for n in (0, 1, 38, 40))
    assert one - none == block and most - none == 38 * block
    assert every == most == need(model, USUAL, MemoryPlan(level=2)).gpu


@pytest.mark.parametrize(("frames", "peak"), [(81, 3.45), (17, 2.00)])
def test_a_streamed_transformer_takes_what_was_measured(frames: int, peak: float) -> None:
    """`python -m tools.bench_offload dit`: forwards of one prompt with two rooms, in GiB, within 3 %."""
    model, size = load_model(LARGE), RequestSize(832, 480, frames, guided=False)
    resident = footprint.resident_dit(model, MemoryPlan(level=3, blocks=0), "bfloat16")
    reckoned = (resident + footprint.dit_bytes(model, size, "bfloat16")) / GIB
    assert abs(reckoned / peak - 1) < 0.03


def test_what_is_encoded_is_tiled_too() -> None:
    """An image-to-video model, or a request that starts from a video, takes no more in tiles than decoding does, and
    untiled as much as the greater of the two."""
    size = RequestSize(1280, 720, 81)
    text, image = (load_model(name) for name in ("wan2.2-t2v-a14b", "wan2.2-i2v-a14b"))
    decode = vae_working_bytes(text, size, Setting(), tiled=True)
    from_video = msgspec.structs.replace(size, image=True)
    assert vae_working_bytes(image, size, Setting(), tiled=True) == decode
    assert vae_working_bytes(text, from_video, Setting(), tiled=True) == decode
    assert vae_working_bytes(image, size, Setting(), tiled=False) > 3 * decode


def test_small_clips_decode_whole_where_tiles_would_take_more() -> None:
    model = load_model(LARGE)
    small, large = RequestSize(64, 64, 5), RequestSize(1280, 720, 81)
    whole, tiled = (vae_working_bytes(model, small, Setting(), tiled=t) for t in (False, True))
    assert tiled == whole
    whole, tiled = (vae_working_bytes(model, large, Setting(), tiled=t) for t in (False, True))
    assert tiled < whole / 4


def test_a_cpu_has_no_contexts() -> None:
    model = load_model("wan-demo")
    found = need(model, RequestSize(96, 96, 17), MemoryPlan(), FLOAT32_CPU)
    assert sum(component_bytes(model, "float32").values()) < found.gpu < GIB


def test_a_device_has_what_computes_there() -> None:
    """On a further dit's GPU there is neither text encoder nor VAE; all stages together have no more than the parts."""
    model = load_model(LARGE)
    bare = Setting(processes=0, queues=False)
    alone = msgspec.structs.replace(bare, stages=("dit",))
    others = msgspec.structs.replace(bare, stages=("text", "vae"))
    for plan in plans(model):
        dit, rest, all_of_them = (need(model, USUAL, plan, s) for s in (alone, others, bare))
        assert max(dit.gpu, rest.gpu) <= all_of_them.gpu <= dit.gpu + rest.gpu
        assert dit.host + rest.host == all_of_them.host
        assert rest.slowdown == 1.0 and dit.slowdown == all_of_them.slowdown
    weights = component_bytes(model, "bfloat16")
    forward = footprint.dit_bytes(model, USUAL, "bfloat16")
    assert need(model, USUAL, MemoryPlan(), alone).gpu == weights["transformer"] + forward


def test_streaming_is_as_slow_as_was_measured() -> None:
    """The 14B on an H100: nothing at 32,760 tokens (measured 0.2 %), about a tenth at 8,000 (measured 9.8 %), and the
    break-even is near 8,700."""
    model, figures = load_model(LARGE), measured()
    assert tokens_of(model, USUAL) == 32760
    assert abs(forward_flops(model, 32760) / 1678e12 - 1) < 0.01
    assert need(model, USUAL, MemoryPlan(level=3, blocks=0)).slowdown == 1.0
    short = RequestSize(832, 480, 17)
    assert tokens_of(model, short) == 7800
    slowdown = need(model, short, MemoryPlan(level=3, blocks=0)).slowdown
    assert 1.08 < slowdown < 1.25
    half = need(model, short, MemoryPlan(level=3, blocks=20)).slowdown
    assert half == 1.0
    rates = figures.copy_bytes_per_second.value, figures.flops.value
    even = break_even_tokens(model, "bfloat16", *rates)
    assert 8000 < even < 9500
    assert break_even_tokens(model, "bfloat16", rates[0] / 2, rates[1]) > even


@given(size=sizes(), budget=st.integers(GIB, 100 * GIB))
@settings(max_examples=100, deadline=None)
def test_a_plan_is_the_first_that_fits(size: RequestSize, budget: int) -> None:
    """No lower level fits, nor one block more; without one, the least there is does not fit."""
    model = load_model(LARGE)
    plan = plan_for(model, size, budget)
    every = [MemoryPlan(level=level) for level in (0, 1, 2)]
    every += [MemoryPlan(level=3, blocks=n) for n in range(model.transformer.num_layers, -1, -1)]
    fitting = [p for p in every if need(model, size, p).gpu <= budget]
    assert plan == (fitting[0] if fitting else None)


@pytest.mark.parametrize("name", list_models())
def test_the_largest_clip_there_can_be(name: str) -> None:
    """Of what the model's limits allow, started from a video, too: 1.3 GiB of host memory and no more, as
    docs/memory.md says."""
    model = load_model(name)
    largest = RequestSize(
        model.limits.max_pixels // model.defaults.height, model.defaults.height, model.limits.max_frames, image=True
    )
    assert 0 < clip_bytes(model, largest, "bfloat16") <= 1.3 * GIB


def test_bounds_keep_levels_out() -> None:
    """A fixed level, and too little host memory for what levels 2 and 3 keep there."""
    model, plenty = load_model(LARGE), 1000 * GIB
    for level in range(4):
        plan = plan_for(model, USUAL, plenty, bounds=Bounds(lowest=level, highest=level))
        assert plan is not None and plan.level == level
    host = sum(component_bytes(model, "bfloat16").values()) + clip_bytes(model, USUAL, "bfloat16")
    assert plan_for(model, USUAL, 24 * GIB, bounds=Bounds(host=host)) == plan_for(model, USUAL, 24 * GIB)
    assert plan_for(model, USUAL, 24 * GIB, bounds=Bounds(host=host - 1)) is None


@pytest.mark.parametrize("name", list_models())
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_refusal_names_what_would_fit(name: str, data: st.DataObject) -> None:
    """And the next larger change would not: one step of frames more, the next larger size, a byte of budget less."""
    model, size = load_model(name), data.draw(sizes(name))
    least = min(n.gpu for n in needs(model, size))
    budget = data.draw(st.integers(least // 4, least - 1))
    assert plan_for(model, size, budget) is None
    said = refusal(model, size, budget)
    assert said.missing == said.least.gpu - budget == least - budget
    assert plan_for(model, size, said.budget) is not None
    assert plan_for(model, size, said.budget - 1) is None
    assert said.level is None
    if said.frames is not None:
        assert said.frames % 4 == 1
        assert plan_for(model, msgspec.structs.replace(size, frames=said.frames), budget) is not None
        assert plan_for(model, msgspec.structs.replace(size, frames=said.frames + 4), budget) is None
    else:
        assert size.frames == 1 or plan_for(model, msgspec.structs.replace(size, frames=1), budget) is None
    candidates = smaller_sizes(model, size)
    fitting = next((c for c in candidates if plan_for(model, c, budget)), None)
    assert said.size == ((fitting.width, fitting.height) if fitting else None)
    for candidate in candidates:
        assert candidate.width % model.size_multiple == candidate.height % model.size_multiple == 0


def test_a_refusal_in_words() -> None:
    """A fixed level that does not fit: the level that would is named; and the missing GB, never rounded down."""
    model = load_model(LARGE)
    said = refusal(model, USUAL, 24 * GIB, bounds=Bounds(highest=1))
    assert said.level == 3
    assert "at memory level 1" in str(said) and "memory_level 3" in str(said)
    assert str(said).endswith(f"{footprint.gigabytes(said.budget)} of GPU memory")
    assert footprint.gigabytes(1) == "0.1 GB" and footprint.gigabytes(10**9) == "1.0 GB"
    assert footprint.gigabytes(10**9 + 1) == "1.1 GB"


def test_a_refusal_for_want_of_host_memory() -> None:
    """Nothing fits the GPU but what needs more host memory than there is: that is named, and suffices. At a fixed level
    it is what is lacking; if the GPU lacks something, too, both are, and suffice together."""
    model, budget = load_model(LARGE), 24 * GIB
    host = need(model, USUAL, MemoryPlan(level=3)).host_all
    said = refusal(model, USUAL, budget, bounds=Bounds(host=host - 1))
    assert said.missing and not said.missing_host and said.host == host
    assert plan_for(model, USUAL, budget, bounds=Bounds(host=said.host)) is not None
    assert str(said).endswith(f", or {footprint.gigabytes(host)} of host memory")

    fixed = Bounds(lowest=3, highest=3, host=host - 1)
    said = refusal(model, USUAL, budget, bounds=fixed)
    assert (said.missing, said.missing_host, said.host) == (0, 1, host)
    assert said.frames == 77 and said.level is None
    assert plan_for(model, msgspec.structs.replace(USUAL, frames=said.frames), budget, bounds=fixed) is not None
    text = str(said)
    assert text.startswith(f"it takes {footprint.gigabytes(host)} of host memory at memory level 3, 0.1 GB more than")
    assert text.endswith(f", or {footprint.gigabytes(host)} of host memory") and "GPU" not in text

    said = refusal(model, USUAL, GIB, bounds=fixed)
    assert said.missing and said.missing_host == 1 and said.host is None
    assert str(said).endswith(
        f"{footprint.gigabytes(said.budget)} of GPU memory and {footprint.gigabytes(host)} of host memory"
    )
    both = msgspec.structs.replace(fixed, host=host)
    assert plan_for(model, USUAL, said.budget, bounds=both) == MemoryPlan(level=3, blocks=0)


def test_an_account_of_an_idle_engine_is_that_of_a_usual_request() -> None:
    model = load_model(LARGE)
    account, usual = Account(model), usual_size(model)
    assert usual == RequestSize(1280, 720, 81, True)
    for plan in plans(model):
        assert account.need(None, plan) == account.need(usual, plan) == need(model, usual, plan)
    assert account.need(USUAL, plans(model)[0]).gpu < account.need(None, plans(model)[0]).gpu


def test_plans_are_in_order() -> None:
    """What a policy may choose from: levels, then fewer and fewer blocks, all and none among them, of any number."""
    for name in list_models():
        model: ModelParams = load_model(name)
        found = plans(model)
        assert [p.level for p in found[:3]] == [0, 1, 2]
        blocks = [p.blocks for p in found[3:]]
        assert blocks[0] == model.transformer.num_layers and blocks[-1] == 0
        assert blocks == sorted(set(blocks), key=lambda n: -(n or 0))


def test_a_budget_bounds_what_each_process_allocates() -> None:
    """Contexts, what the others keep and what a process may allocate are the budget, at every level; the dit's room
    for the usual request is in it."""
    model, budget = load_model("wan2.1-t2v-14b"), 40 << 30
    setting = Setting(queues=False)
    contexts = int(setting.processes * measured().context_bytes.value)
    weights = sum(component_bytes(model, setting.dtype).values())
    resident = allocation_limits(model, MemoryPlan(level=1), setting, 60 << 30)
    assert set(resident.values()) == {(60 << 30) - contexts - weights}
    for blocks in (0, 10):
        plan = MemoryPlan(level=3, blocks=blocks)
        limits = allocation_limits(model, plan, setting, budget)
        assert limits["dit"] == budget - contexts
        assert limits["dit"] - limits["vae"] == resident_dit(model, plan, setting.dtype) > 0
        fused = allocation_limits(model, plan, Setting(queues=False, processes=1), budget)
        assert set(fused.values()) == {budget - contexts // 3}
    for plan in (MemoryPlan(), MemoryPlan(level=3, blocks=0)):
        tight = need(model, usual_size(model), plan, setting)
        assert allocation_limits(model, plan, setting, tight.gpu)["dit"] >= 0
        assert set(allocation_limits(model, plan, setting, 1 << 30).values()) == {0}, "never below nothing"
