"""When quanta ran, and where: `engine trace`."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from engine import Client
from engine.levels import MAX_REASON
from engine.trace import KEPT_CHANGES, KEPT_QUANTA, Trace, chrome_trace, of_tasks
from engine.trace_file import write_trace
from ipc.errors import Failure, NotFound
from ipc.frames import MAX_FRAME, encode_frame
from ipc.messages.memory import MemoryPlan
from ipc.messages.reports import QuantumDone, QuantumDropped, QuantumFailed
from ipc.messages.server import Done, Traced
from ipc.messages.status import Copied, MemoryChange, Span
from tests.engine.wire import EngineProcess, run_engine

STEPS = 3
TASK = "0123456789abcdef0123456789abcdef"


class Ran(NamedTuple):
    socket: Path
    done: list[Done]
    """Of two requests that were there at the same time."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    directory = tmp_path_factory.mktemp("trace")
    with EngineProcess(directory, "--placement", "split") as engine:
        client = Client(engine.socket)
        asked = [
            client.submit(prompt="a red circle", steps=STEPS, num_frames=17, output=str(directory / f"{seed}.mp4"))
            for seed in range(2)
        ]
        yield Ran(engine.socket, [client.result(accepted.id) for accepted in asked])


def slices(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Row -> its slices, by their begin, of a file as the command writes it."""
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    groups = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[f"{groups[event['pid']]} {names[event['tid']]}"].append(event)
    return {row: sorted(found, key=lambda e: e["ts"]) for row, found in rows.items()}


def test_changes_of_memory_levels_are_instants() -> None:
    """In a row of their device, beside the quanta that they came between; those of another time are left out. The
    latest are kept."""
    span = Span(TASK, "dit", "cuda:0", "denoise", 0, granted=10.0, begin=10.0, end=12.0)
    low, high = MemoryPlan(level=0), MemoryPlan(level=3, blocks=7)

    def change(at: float, error: Failure | None = None) -> MemoryChange:
        return MemoryChange(
            at=at, device="cuda:0", before=low, after=high, why="it was short", seconds=0.5, error=error
        )

    trace = Trace({"dit": "cuda:0"}, [span], [change(0.0)] * KEPT_CHANGES)
    trace.change(change(11.0))
    trace.change(change(11.5, Failure("out_of_memory", "no room")))
    assert len(trace.changes()) == KEPT_CHANGES
    events = chrome_trace(trace.spans(), 0.0, trace.changes())["traceEvents"]
    instants = [event for event in events if event["ph"] == "i"]
    assert [(e["name"], e["ts"]) for e in instants] == [
        ("level 3, 7 blocks", 1e6), ("not level 3, 7 blocks", 1.5e6)
    ]  # fmt: skip
    assert instants[1]["args"] == {"from": 0, "why": "it was short", "milliseconds": 500.0, "error": "no room"}
    (row,) = {event["tid"] for event in instants}
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[row] == "cuda:0 memory level"


def test_copies_have_a_row_of_their_own() -> None:
    """Beside what computes on the device, those to it and those out of it; with what was copied, and how fast."""
    trace = Trace({"dit": "cuda:0"})
    trace.grant("dit", TASK, "denoise", 4, 9.9)
    copied = Copied(begin=9.5, end=11.0, seconds=0.5, bytes=25_000_000_000)
    out = Copied(begin=12.0, end=12.25, seconds=0.25, bytes=1_000_000_000)
    trace.answer(
        "dit",
        QuantumDone(id=TASK, phase="denoise", index=4, begin=10.0, seconds=2.0, copied=copied, delivered=out),
    )
    events = chrome_trace(trace.spans(), 0.0)["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["cuda:0", "cuda:0 copies", "cuda:0 copies out", "dit"]
    found, delivered = (e for e in events if e.get("cat") == "copies")
    assert (names[found["tid"]], found["name"], found["ts"], found["dur"]) == ("cuda:0 copies", "25.0 GB", 0, 1.5e6)
    assert found["args"]["gigabytes_per_second"] == 50.0 and found["args"]["milliseconds"] == 500.0
    assert found["args"] | {"task": TASK, "phase": "denoise", "index": 4} == found["args"]
    assert (names[delivered["tid"]], delivered["name"], delivered["dur"]) == ("cuda:0 copies out", "1.0 GB", 0.25e6)
    assert delivered["ts"] == 2.5e6 and delivered["args"]["gigabytes_per_second"] == 4.0


def test_the_file(ran: Ran, tmp_path: Path) -> None:
    """All that ran: a row for each stage and each compute token, slices of a row one after another, every quantum of
    both requests once, none before its grant, and as long as the requests' metadata say."""
    out = tmp_path / "all.json"
    said = run_engine("trace", "--out", out, "--socket", ran.socket)
    assert said.returncode == 0 and "2 requests" in said.stdout, said.stderr
    rows = slices(out)
    copies = "devices cpu:vae copies out"
    assert {"stages text", "stages dit", "stages vae", "stages writer", "devices cpu:dit", copies} <= set(rows)
    decoded = sorted((e["args"]["task"], e["args"]["index"]) for e in rows["stages vae"])
    assert sorted((e["args"]["task"], e["args"]["index"]) for e in rows[copies]) == decoded
    for found in rows.values():
        for before, after in itertools.pairwise(found):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.002, "microseconds, rounded to thousandths"
    quanta = [e for row, found in rows.items() if row.startswith("stages") for e in found]
    for done in ran.done:
        its = [e["args"] for e in quanta if e["args"]["task"] == done.id]
        chunks = 1 + max(e["index"] for e in its if e["phase"] == "write")
        wanted = {"text": 1, "denoise": STEPS, "decode": chunks, "write": chunks}
        assert sorted((e["phase"], e["index"]) for e in its) == sorted(
            (phase, index) for phase, count in wanted.items() for index in range(count)
        )
        assert all(e["milliseconds_after_grant"] >= 0 and not e["failed"] for e in its)
        for phase in ("text", "denoise", "decode"):  # the last write tells before it ends
            seconds = sum(e["dur"] for e in quanta if e["args"]["task"] == done.id and e["cat"] == phase) / 1e6
            assert seconds == pytest.approx(done.metadata["seconds"][phase], abs=2e-3)


def test_one_request(ran: Ran, tmp_path: Path) -> None:
    """By the first characters of its id, and the last one to begin; what does not exist is an error."""
    first, last = (done.id for done in ran.done)
    for words, identity in (((first[:8],), first), (("--last",), last)):
        out = tmp_path / "one.json"
        assert run_engine("trace", *words, "-o", out, "--socket", ran.socket).returncode == 0
        assert {e["args"]["task"] for found in slices(out).values() for e in found} == {identity}
    for words in (("nonsense",), (first, "--last"), ("-o", str(tmp_path / "no" / "where.json"))):
        refused = run_engine("trace", *words, "--socket", ran.socket)
        assert refused.returncode in (1, 2) and refused.stderr.startswith("engine: "), refused.stderr


def test_a_request_writes_its_own(ran: Ran, tmp_path: Path) -> None:
    """`generate --trace`, on a server and without one: every quantum of the request, the last one too, and no other;
    where it cannot be written is said before anything is computed."""
    words = ("generate", "a red circle", "--steps", STEPS, "--num-frames", 17, "--out", tmp_path / "v.mp4")
    for socket in (ran.socket, tmp_path / "nobody.sock"):
        out = tmp_path / "own.json"
        said = run_engine(*map(str, words), "--trace", str(out), "--socket", str(socket))
        assert said.returncode == 0 and f"{out}: " in said.stdout and "of 1 request;" in said.stdout, said.stderr
        found = [e["args"] for row, its in slices(out).items() if row.startswith("stages") for e in its]
        counted = Counter(args["phase"] for args in found)
        assert counted["text"] == 1 and counted["denoise"] == STEPS
        assert counted["write"] == counted["decode"] > 1
        assert len({args["task"] for args in found}) == 1
        out.unlink()
    for out, problem in ((tmp_path / "no" / "t.json", "there is no such directory"), (tmp_path, "it is a directory")):
        refused = run_engine(*map(str, words), "--trace", str(out), "--socket", str(ran.socket))
        assert refused.returncode == 1 and not refused.stdout
        assert refused.stderr == f"engine: the trace cannot be written to {out}: {problem}\n"
    full = run_engine(*map(str, words), "--trace", "/dev/full", "--socket", str(ran.socket))
    assert full.returncode == 1 and "v.mp4" in full.stdout, "what was made is said all the same"
    assert full.stderr.endswith("engine: the trace cannot be written to /dev/full: No space left on device\n")


def test_a_trace_that_is_cut_off_says_so(tmp_path: Path) -> None:
    """The engine keeps a number of quanta; of a request whose first ones are gone, that is said."""
    trace = Trace({"dit": None})
    for index in range(KEPT_QUANTA + 1):
        trace.grant("dit", TASK, "denoise", index, float(index))
        trace.answer("dit", QuantumDone(id=TASK, phase="denoise", index=index, begin=float(index), seconds=0.5))
    *before, last = trace.spans()
    other = msgspec.structs.replace(last, task="f" * 32)
    out = tmp_path / "t.json"
    whole = Traced(ref=0, spans=[*before, other], clock=0.0)
    assert f"(the engine keeps {KEPT_QUANTA}: what ran before is not in it)" in write_trace(out, whole, TASK[:8])
    assert "keeps" not in write_trace(out, whole, other.task)
    assert "keeps" not in write_trace(out, Traced(ref=0, spans=before, clock=0.0))


def test_what_is_remembered() -> None:
    """When a quantum was granted; the grants to a process that died are forgotten, and what it says at last counts as
    granted when it began. What was skipped is not in it; a failure is."""
    trace = Trace({"dit": "cuda:0", "writer": None})
    for index in range(3):
        trace.grant("dit", TASK, "denoise", index, 1.0 + index)
    trace.answer("dit", QuantumDone(id=TASK, phase="denoise", index=0, begin=1.5, seconds=1.0))
    trace.answer("dit", QuantumDropped(id=TASK, phase="denoise", index=1))
    trace.lose("dit")
    trace.answer("dit", QuantumDone(id=TASK, phase="denoise", index=2, begin=3.5, seconds=0.5))
    trace.grant("dit", TASK, "denoise", 1, 4.0)
    trace.answer(
        "dit", QuantumFailed(id=TASK, phase="denoise", index=1, begin=5.0, seconds=0.5, error=Failure("x", "y"))
    )
    assert trace.spans() == [
        Span(TASK, "dit", "cuda:0", "denoise", 0, granted=1.0, begin=1.5, end=2.5),
        Span(TASK, "dit", "cuda:0", "denoise", 2, granted=3.5, begin=3.5, end=4.0),
        Span(TASK, "dit", "cuda:0", "denoise", 1, granted=4.0, begin=5.0, end=5.5, failed=True),
    ]
    with pytest.raises(NotFound):
        of_tasks([], None, last=True)


def test_the_latest_are_kept_and_fit_into_a_frame() -> None:
    """One quantum more than are kept: the first is gone, and the answer to a client is within the cap."""
    trace = Trace({"dit:15": "cpu:dit:15"})
    for index in range(KEPT_QUANTA + 1):
        done = QuantumDone(id=TASK, phase="denoise", index=100_000 + index, begin=index + 0.1, seconds=0.1)
        trace.grant("dit:15", TASK, "denoise", done.index, float(index))
        trace.answer("dit:15", done)
    spans = trace.spans()
    assert len(spans) == KEPT_QUANTA and spans[0].index == 100_001
    plan, error = MemoryPlan(level=3, blocks=40), Failure("out_of_memory", "x" * MAX_REASON)
    change = MemoryChange(
        at=1e9, device="cuda:15", before=plan, after=plan, why="x" * 100, seconds=0.123456789, error=error
    )  # fmt: skip
    frame = encode_frame(Traced(ref=1, spans=spans, clock=1.7e9, changes=[change] * KEPT_CHANGES))
    assert len(frame) <= MAX_FRAME
