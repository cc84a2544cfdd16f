"""Numbers and rows as people read them."""

from __future__ import annotations

import shlex

import msgspec
import pytest

from engine.amounts import said_blocks, seconds, size
from engine.display import progress, status
from engine.display.progress import LoadMeter, PlainView, summary
from engine.display.status import state
from engine.generate import Order, Outcome, suggestions
from engine.monitor import Sample
from engine.params import UserParams
from ipc.errors import Failure
from ipc.messages.memory import MemoryPlan
from ipc.messages.server import Done
from ipc.messages.status import DeviceMemory, HostCopies, LoadProgress, MemoryChange, StageStatus


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.042, "0.04 s"), (4.21, "4.2 s"), (42.3, "42 s"), (59.7, "60 s"), (422, "7 min 2 s"), (11_040, "3 h 4 min")],
)
def test_seconds(value: float, shown: str) -> None:
    """Two digits are enough."""
    assert seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (73_400, "73 kB"), (28e9, "28.0 GB")]
)
def test_size(value: float, shown: str) -> None:
    """Powers of 1000."""
    assert size(value) == shown


def test_blocks() -> None:
    """One is one."""
    assert [said_blocks(number) for number in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]


def test_the_rate_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """MB, where GB would be 0.00."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    meter = LoadMeter()
    meter.update(loads(("vae", 1, 9_600_000)))
    now = 102.0
    meter.update(loads(("vae", 9_600_000, 9_600_000)))
    assert meter.rate == "4.8 MB/s"


def test_the_summary_of_a_video_that_is_gone() -> None:
    """It has no size; what loading and waiting took is said when there was any."""
    params = {"prompt": "a circle", "num_frames": 17, "fps": 8, "width": 96, "height": 96, "seed": 7}
    metadata = {"parameters": params, "seed": 7, "seconds": {"text": 0.01, "denoise": 3.2}}
    done = Done(id="0", path="/gone/a b.mp4", metadata=metadata)
    assert summary(done, 4.0, 0.0) == [
        "/gone/a b.mp4  96x96, 17 frames at 8 fps (2.1 s), 0 B",
        "seed 7, 4.0 s in all: text 0.01 s, denoise 3.2 s",
    ]
    assert summary(done, 9.0, 5.0)[1] == "seed 7, 9.0 s in all: load 5.0 s, text 0.01 s, denoise 3.2 s"
    assert summary(done, 9.0, 5.0, 0.09) == summary(done, 9.0, 5.0)
    assert summary(done, 9.0, 0.0, 4.2)[1] == "seed 7, 9.0 s in all: wait 4.2 s, text 0.01 s, denoise 3.2 s"


def test_suggestions_can_be_pasted_into_a_shell() -> None:
    """Every option that was given is in them, quoted; the largest seed is followed by 0; no prompt is cut."""
    prompt = "it's a $HOME `run` " * 10
    params = UserParams(prompt=prompt, steps=30, guidance_scale_2=2.0, metadata_json=True, output="/gone/a b.mp4")
    order = Order(params=params, model="wan-demo")
    done = Done(id="0", path="/gone/a b.mp4", metadata={"seed": 2**63 - 1})
    again, onward, serve = suggestions(order, Outcome(done, 4.0, 1.0, True))
    words = shlex.split(again, comments=True)
    assert words[:3] == ["engine", "generate", prompt]
    assert {"--steps", "30", "--guidance-scale-2", "2.0", "--metadata-json", "--model", "wan-demo"} <= set(words)
    assert words[words.index("--seed") + 1] == "0"
    assert words[words.index("--out") + 1] == "/gone/a b-2.mp4"
    assert "--video" in shlex.split(onward, comments=True)
    assert serve.startswith("engine serve")


def test_suggestions_are_for_the_engine_that_was_asked() -> None:
    """An engine on a socket of its own is on that in every command."""
    order = Order(params=UserParams(prompt="a circle", output="/gone/v.mp4"), socket="/run/my engine/s.sock")
    done = Done(id="0", path="/gone/v.mp4", metadata={"seed": 1})
    for line in suggestions(order, Outcome(done, 4.0, 0.0, False)):
        words = shlex.split(line, comments=True)
        assert words[words.index("--socket") + 1] == "/run/my engine/s.sock"


def test_an_image_to_video_model_is_not_sent_on_to_a_video() -> None:
    """What such a model made is no start for it: another take is suggested, with the same image; LoRAs are repeated."""
    params = UserParams(prompt="a circle", image="/gone/a.png", preset="distilled", output="/gone/v.mp4")
    order = Order(params=params, model="wan2.2-i2v-a14b", lora=("h.safetensors,l.safetensors:0.5", "x.safetensors:1"))
    done = Done(id="0", path="/gone/v.mp4", metadata={"seed": 1, "init": {"file": "a.png", "as": "channels"}})
    again, other = suggestions(order, Outcome(done, 4.0, 1.0, True))
    words = shlex.split(again, comments=True)
    assert words[words.index("--image") + 1] == "/gone/a.png"
    assert words[words.index("--preset") + 1] == "distilled"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--lora"] == list(order.lora)
    assert "--video" not in other


def loads(*rows: tuple[str, int, int]) -> list[LoadProgress]:
    return [LoadProgress(component=name, done=done, total=total) for name, done, total in rows]


def test_the_meter_adds_up_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two components at once: their names, their bytes together, and the rate since the first byte."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    meter = LoadMeter()
    meter.update(loads(("text_encoder", 0, 10), ("transformer", 0, 20)))
    assert (meter.what, meter.rate, meter.complete) == ("loading", "", False)
    meter.update(loads(("text_encoder", 1, 10_000_000_000), ("transformer", 0, 20_000_000_000)))
    now = 104.0
    meter.update(loads(("text_encoder", 4_000_000_000, 10_000_000_000), ("transformer", 2, 20_000_000_000)))
    assert meter.what == "loading text_encoder, transformer"
    assert meter.amount == "4.0 GB of 30.0 GB"
    assert meter.rate == "1.0 GB/s"
    meter.update(loads(("text_encoder", 5, 5), ("transformer", 5, 5)))
    assert meter.complete


def test_plain_lines_of_loading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal: a line every few seconds while weights are read, and one when all are there."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    view = PlainView()
    for time, done in ((0.5, 1), (1.0, 1_000), (6.0, 11_000_000_000), (7.0, 12_000_000_000), (10.5, 20_000_000_000)):
        now = time
        view.load(loads(("transformer", done, 20_000_000_000)))
    view.load(loads(("transformer", 20_000_000_000, 20_000_000_000)))
    assert capsys.readouterr().err.splitlines() == [
        "loading transformer: 11.0 GB of 20.0 GB 2.0 GB/s",
        "loaded 20.0 GB 2.0 GB/s",
    ]


def test_the_state_of_a_stage_that_loads() -> None:
    """Which component and how much of it; when all of it is there, and when there is nothing to load, the state."""
    stage = StageStatus(
        name="dit", state="starting", pid=1, device="cpu", epoch=1, restarts=0, resident_bytes=0, busy_seconds=0,
        quanta=0, loading=LoadProgress(component="transformer", done=434, total=1000),
    )  # fmt: skip
    assert state(stage) == "loading transformer 43 %"
    for loading in (None, LoadProgress(component="transformer", done=10, total=10)):
        assert state(msgspec.structs.replace(stage, loading=loading)) == "starting"


def test_the_row_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The level with its blocks, who chooses it and within what, how far the copies are or why there are none, whose
    the memory is, and the last change with what it failed of."""
    change = MemoryChange(
        at=1.0, device="cuda:0", before=MemoryPlan(), after=MemoryPlan(level=3, blocks=5), why="9.4 GB free",
        seconds=0.43, error=None,
    )  # fmt: skip
    sample = Sample(at=0.0, total=80 << 30, ours=10**10, others=6 * 10**10, free=10**9)
    device = DeviceMemory(
        device="cuda:0", plan=change.after, mode="auto", levels=[0, 1], budget=12 << 30, last=change,
        copies=HostCopies(state="reading", done=10**10, total=4 * 10**10), sample=msgspec.to_builtins(sample),
    )  # fmt: skip
    failed = msgspec.structs.replace(change, error=Failure("out_of_memory", "the slots do not fit"))
    copies = HostCopies(state="none", problem="host memory is short")
    other = msgspec.structs.replace(device, mode="fixed", budget=None, copies=copies, last=failed, sample=None)
    slow = msgspec.structs.replace(
        other, device="cuda:1", slow="the pages of some weights cannot be locked: " + "x " * 60
    )
    status.print_plans([device, other, slow])
    _, first, second, _, empty, *said = capsys.readouterr().out.splitlines()
    assert not empty and " ".join(said).split() == f"cuda:1: {slow.slow}".split() and max(map(len, said)) <= 100
    assert [cell.strip() for cell in first.split("  ") if cell.strip()] == [
        "cuda:0", "3, 5 blocks stay", "auto, budget 12.9 GB", "0, 1", "10.0 GB of 40.0 GB",
        "10.0 GB ours, 60.0 GB others', 1.0 GB free", "0 to 3 in 0.43 s: 9.4 GB free",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.split("  ") if cell.strip()] == [
        "cuda:0", "3, 5 blocks stay", "fixed", "0, 1", "host memory is short", "-",
        "0 to 3 in 0.43 s: 9.4 GB free; failed: the slots do not fit",
    ]  # fmt: skip
