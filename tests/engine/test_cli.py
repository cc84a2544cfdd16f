"""The command line, as a user runs it: processes, exit codes, what is on stdout and what on stderr."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import Client
from engine.models import CONFIGS, list_models
from engine.version import VERSION
from tests.engine.adapters import write_adapter
from tests.engine.wire import EngineProcess, command, environment, run_engine, session_processes, wait_for

SMALL = ("--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2", "--seed", "1")
LONG = (*SMALL[:-4], "--steps", "1000")
PROMPT = "a red circle moves left"


@pytest.fixture
def nowhere(short_dir: Path) -> Path:
    """A socket path where no engine listens."""
    return short_dir / "engine.sock"


def test_generate_alone_makes_a_video_and_says_what_to_do_next(nowhere: Path, tmp_path: Path) -> None:
    """No engine runs: the video is made all the same; stderr shows the phases, stdout the file and what it cost."""
    ran = run_engine(
        "generate", PROMPT, "--out", tmp_path / "v.mp4", *SMALL, "--placement", "fused", "--socket", nowhere
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "v.mp4").stat().st_size > 0
    assert "loading wan-demo" in ran.stderr
    assert "loaded 9.6 MB" in ran.stderr
    assert "denoising" in ran.stderr
    first, cost, *rest = ran.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'v.mp4'}  32x32, 5 frames at 8 fps (0.6 s), ")
    assert cost.startswith("seed 1, ")
    assert all(phase in cost for phase in ("text", "denoise", "decode"))
    assert rest[0] == "next:"
    assert "engine serve" in ran.stdout
    assert not nowhere.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", ""), "the prompt is empty"),
        (("generate", "circle " * 600), "601 tokens"),
        (("generate", PROMPT, "--num-frames", "16"), "nearest is 13 or 17"),
        (("generate", PROMPT, "--height", "100"), "nearest is 96"),
        (("generate", PROMPT, "--steps", "0"), "from 1 to 1000"),
        (("generate", PROMPT, "--steps", "10000"), "from 1 to 1000"),
        (("generate", PROMPT, "--solver", "unipcc"), "did you mean 'unipc'?"),
        (("generate", PROMPT, "--fps", "0"), "fps must be a whole number >= 1"),
        (("generate", PROMPT, "--model", "wan-dmeo"), "the known models are: "),
        (("generate", PROMPT, "--placement", "both"), "one of split, fused"),
        (("generate", PROMPT, "--checkpoint", "/nowhere"), "not a directory"),
        (("generate", PROMPT, "--checkpoint", CONFIGS / "models"), "a directory without weights"),
        (("generate", PROMPT, "--lora", "x.safetensors:strong"), "'strong' is not a strength"),
        (("generate", PROMPT, "--lora", "style:0.5"), "no engine is running, so --lora takes files"),
        (("lora", "add", "style", "x.safetensors:0.5"), "requests choose the strength"),
        (("lora", "add", "style", "x.bin"), "expected FILE or HIGH_FILE,LOW_FILE"),
        (("generate", PROMPT, "--lora", "none.safetensors:0.5"), "LoRA none.safetensors cannot be read"),
        (("generate", PROMPT, "--preset", "distiled"), "did you mean 'distilled'?"),
        (("generate", PROMPT, "--noise-device", "cuda", "--image", "none.png"), "computes on the CPU"),
        (("generate", PROMPT, "--guidance-scale-2", "2"), "guidance_scale the high-noise one's"),
        (("generate", PROMPT, "--model", "wan2.1-t2v-1.3b"), "say where they are with --checkpoint DIR"),
        (("generate", PROMPT, "--model", "wan2.1-t2v-1.3b", "--checkpoint", CONFIGS / "demo"), "--model wan-demo"),
        (("generate", PROMPT, "--out", "/nowhere/v.mp4"), "does not exist"),
        (("generate", PROMPT, "--out", "video.avi"), "must end in .mp4"),
        (("generate", PROMPT, "--image", "none.png"), "cannot be read"),
        (("serve", "--model", "wan-dmeo"), "the known models are: "),
        (("serve", "--policy", "random"), "one of shortest, fifo"),
        (("serve", "--max-queue", "0"), "max_queue must be a whole number >= 1"),
        (("serve", "--dit-device", "cpu", "--dit-device", "cpu", "--placement", "fused"), "use placement split"),
        (("serve", "--config", "none.yaml"), "none.yaml cannot be read"),
        (("serve", "--checkpoint", CONFIGS / "models"), "a directory without weights"),
        (("serve", "--lora", "a.safetensors,b.safetensors:1", "--lora", "c:1"), "expected FILE or HIGH_FILE,LOW_FILE"),
        (("serve", "--memory-level", "4"), "must be auto, 0, 1, 2, 3"),
        (("serve", "--gpu-budget", "8 TB"), "such as 8GiB or 7.5 GB"),
        (("serve", "--gpu-budget", "8GiB", "--device", "cpu"), "computes on the CPU"),
        (("memory", "most"), "must be auto, 0, 1, 2, 3"),
        (("memory", "2", "--blocks", "4"), "--blocks is of level 3"),
        (("reload", "--attention-backend", "math"), "say which, with --stage NAME or --all"),
        (("reload", "--threads", "2", "--checkpoint", CONFIGS / "demo"), "say which, with --stage NAME or --all"),
        (("reload", "--stage", "dit", "--dry-run"), "--dry-run is of weights: say where they are, with --checkpoint"),
        (("reload", "--supervisor", "--component", "vae", "--when", "now"), "--component and --when are of weights"),
        (("reload", "--all", "--canary", "c.json", "--manifest", "sums"), "--canary and --manifest are of weights"),
        (("cancel", "abc"), "no engine listens"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(nowhere: Path, arguments: tuple[str, ...], says: str) -> None:
    """What is wrong and what to change, on one line of stderr; exit code 2 (1 where nobody listens)."""
    ran = run_engine(*arguments, "--socket", nowhere)
    assert ran.returncode == (1 if arguments[0] == "cancel" else 2)
    assert says in ran.stderr
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert ran.stdout == ""
    assert not nowhere.exists()


def test_a_socket_path_that_is_too_long_is_refused_by_every_command(short_dir: Path) -> None:
    """108 bytes and more: exit code 2 before anything is tried."""
    path = short_dir / ("x" * 100)
    for arguments in (("serve",), ("generate", PROMPT), ("status",), ("list",), ("shutdown",)):
        ran = run_engine(*arguments, "--socket", path)
        assert ran.returncode == 2
        assert "at most 107" in ran.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission_is_found_before_computing(nowhere: Path, tmp_path: Path) -> None:
    """Exit code 2, and no model was loaded."""
    (tmp_path / "closed").mkdir(mode=0o500)
    ran = run_engine("generate", PROMPT, "--out", tmp_path / "closed" / "v.mp4", "--socket", nowhere)
    assert ran.returncode == 2
    assert "cannot be written" in ran.stderr
    assert "loading" not in ran.stderr


@contextmanager
def generating(directory: Path, *options: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`engine generate` of a long video in a session of its own, as a terminal would start it; stderr is a pipe."""
    process = subprocess.Popen(
        command("generate", PROMPT, "--out", directory / "v.mp4", *LONG, *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        yield process
        assert process.poll() is not None
        wait_for(
            lambda: not session_processes(process.pid), f"its processes to end: {session_processes(process.pid)}", 10
        )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Read stderr up to a line with `text`."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"{text!r} did not come on stderr")


def test_what_went_wrong_is_said_once(nowhere: Path, tmp_path: Path) -> None:
    """The output directory goes while the request is computed: one sentence, and not a line of a server's log."""
    (tmp_path / "gone").mkdir()
    options = (*SMALL[:-4], "--steps", "40", "--socket", nowhere)
    process = subprocess.Popen(
        command("generate", PROMPT, "--out", tmp_path / "gone" / "v.mp4", *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    read_until(process, "denoising")
    (tmp_path / "gone").rmdir()
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 1
    assert rest.count("could not be written") == 1 and rest.splitlines()[-1].startswith("engine: v.mp4 could not"), rest


@pytest.mark.parametrize(("when", "placement"), [("loading", "split"), ("denoising", "fused")])
def test_ctrl_c_cancels_and_leaves_nothing(nowhere: Path, tmp_path: Path, when: str, placement: str) -> None:
    """SIGINT to the whole group, as from a terminal, while loading or computing: exit code 130, a sentence, no
    traceback of any process, no process left, no file left."""
    with generating(tmp_path, "--socket", nowhere, "--placement", placement) as process:
        read_until(process, when)
        os.killpg(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130
    assert rest.splitlines()[-2:] == ["cancelling; once more to leave at once", "engine: the request was cancelled"]
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_ctrl_c_twice_leaves_at_once(nowhere: Path, tmp_path: Path) -> None:
    """The second SIGINT does not wait for the step in hand: the stages are killed; nothing is left."""
    with generating(tmp_path, "--socket", nowhere, "--placement", "fused") as process:
        read_until(process, "denoising")
        os.killpg(process.pid, signal.SIGINT)
        read_until(process, "cancelling")
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        _, rest = process.communicate(timeout=60)
        assert time.monotonic() - began < 4
        assert process.returncode == 130
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_killing_generate_takes_its_stages_along(nowhere: Path, tmp_path: Path) -> None:
    """SIGKILL of the command alone: its stage processes notice and leave by themselves; no half file."""
    with generating(tmp_path, "--socket", nowhere, "--placement", "fused") as process:
        read_until(process, "denoising")
        process.kill()
        process.wait()
        wait_for(lambda: not session_processes(process.pid), "the stages to leave", 15)
    assert not list(tmp_path.iterdir())


def test_generate_uses_the_running_engine(engine_process: EngineProcess, tmp_path: Path) -> None:
    """With an engine at the socket nothing is loaded; `--json` prints one object on stdout and nothing else."""
    ran = run_engine(
        "generate",
        PROMPT,
        "--out",
        tmp_path / "v.mp4",
        "--metadata-json",
        *SMALL,
        "--json",
        "--socket",
        engine_process.socket,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    printed = json.loads(ran.stdout)
    assert printed["path"] == str(tmp_path / "v.mp4")
    assert printed["metadata"] == json.loads((tmp_path / "v.json").read_text())
    assert printed["id"] in {task.id for task in Client(engine_process.socket).tasks()}


def test_an_engine_that_still_loads_is_waited_for(short_dir: Path) -> None:
    """Its stages are stopped while they load: the client says what it waits for, without an estimate; when they go on,
    the video is made, and the result says how much of the time was loading."""
    with EngineProcess(short_dir) as engine:
        client = Client(engine.socket)
        wait_for(lambda: client.status().forks_pid is not None, "the process that loads for all of them")
        pid = client.status().forks_pid
        assert pid is not None and client.status().stages[0].pid is None
        os.kill(pid, signal.SIGSTOP)
        options = ("--out", short_dir / "v.mp4", *SMALL, "--socket", engine.socket)
        process = subprocess.Popen(
            command("generate", PROMPT, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(),
        )  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting for the engine, which is loading its weights")
        wait_for(lambda: Client(engine.socket).tasks(), "the request to be accepted")
        os.kill(pid, signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert "waiting 0/" not in stderr
        assert "in all: load " in stdout.splitlines()[1]


def test_loras_of_a_running_engine(engine_process: EngineProcess, tmp_path: Path) -> None:
    """Added, listed, asked for by name and strength, removed; then a request for it is refused."""
    file = write_adapter(tmp_path / "style.safetensors", 1, 4)
    at = ("--socket", engine_process.socket)
    small = ("--steps", "2", "--num-frames", "1", "--height", "32", "--width", "32", "--out", tmp_path / "v.mp4")
    added = run_engine("lora", "add", "style", file, "--json", *at)
    assert added.returncode == 0, added.stderr
    (listed,) = json.loads(run_engine("lora", "list", "--json", *at).stdout)
    assert listed == json.loads(added.stdout)
    assert (listed["name"], listed["rank"], listed["files"]) == ("style", 4, ["style.safetensors"])
    made = run_engine("generate", PROMPT, *small, "--lora", "style:0.5", "--json", *at)
    assert made.returncode == 0, made.stderr
    (adapter,) = json.loads(made.stdout)["metadata"]["adapters"]
    assert adapter == {"name": "style", "strength": 0.5, "content": listed["content"]}
    removed = run_engine("lora", "remove", "style", *at)
    assert (removed.returncode, removed.stdout) == (0, "removed style\n")
    refused = run_engine("generate", PROMPT, *small, "--lora", "style:0.5", *at)
    assert refused.returncode == 2 and "no LoRA has the name 'style'" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "wan2.1-t2v-1.3b"), "serves wan-demo, not wan2.1-t2v-1.3b"),
        (("--placement", "fused"), "--placement cannot be chosen"),
        (("--checkpoint", "/tmp"), "--checkpoint cannot be chosen"),
        (("--lora", "a.safetensors:1"), "no LoRA has the name 'a.safetensors'; none is loaded"),
        (("--steps", "0"), "from 1 to 1000"),
        (("--out", "/nowhere/v.mp4"), "does not exist"),
    ],
)
def test_what_the_running_engine_cannot_do_is_said(
    engine_process: EngineProcess, options: tuple[str, ...], says: str
) -> None:
    """Another model, options of an engine of one's own, a bad request: exit code 2 and a way out."""
    ran = run_engine("generate", PROMPT, *options, "--socket", engine_process.socket)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "loading" not in ran.stderr


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_cancels_on_the_engine_too(engine_process: EngineProcess, tmp_path: Path, signals: int) -> None:
    """SIGINT, once or twice: exit code 130, the engine's task is cancelled, the engine goes on, no file is there."""
    with generating(tmp_path, "--socket", engine_process.socket) as process:
        read_until(process, "denoising")
        os.killpg(process.pid, signal.SIGINT)
        if signals == 2:
            read_until(process, "cancelling")
            os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        # A second signal in the last moment, when nothing is left to cancel, is the end; a shell calls that 130, too.
        assert process.returncode == 130 or (signals == 2 and process.returncode == -signal.SIGINT)
    client = Client(engine_process.socket)
    [task] = [task for task in client.tasks() if task.path == str(tmp_path / "v.mp4")]
    wait_for(lambda: {t.id: t.state for t in client.tasks()}[task.id] == "cancelled", "the cancel to arrive")
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_there_is_a_bar(engine_process: EngineProcess, tmp_path: Path) -> None:
    """With a terminal as stderr the phase, the bar and the steps are drawn in place."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("generate", PROMPT, "--out", tmp_path / "v.mp4", *SMALL, "--socket", engine_process.socket),
        stdout=subprocess.PIPE, stderr=theirs, env=environment(TERM="xterm-256color", COLUMNS="100"),
    )  # fmt: skip
    os.close(theirs)
    drawn = bytearray()
    try:
        while data := os.read(ours, 65536):
            drawn += data
    except OSError:
        pass  # EIO: the terminal's last user has closed it
    finally:
        os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert str(tmp_path / "v.mp4").encode() in stdout
    text = drawn.decode()
    assert "\x1b[" in text
    assert "━" in text
    assert any(phase in text for phase in ("denoising", "decoding", "writing"))


def test_status_list_and_cancel(engine_process: EngineProcess, tmp_path: Path) -> None:
    """A long request shows in `status` and `list`, is cancelled by the start of its id, and then shows as cancelled."""
    where = ("--socket", engine_process.socket)
    accepted = Client(engine_process.socket).submit(
        prompt=PROMPT, height=32, width=32, num_frames=5, steps=1000, output=str(tmp_path / "v.mp4")
    )
    status = run_engine("status", *where).stdout
    assert "with wan-demo" in status
    assert all(name in status for name in ("text", "dit", "vae", "writer", "prompts", "latents", "frames"))
    assert json.loads(run_engine("status", "--json", *where).stdout)["model"] == "wan-demo"
    listed = run_engine("list", *where).stdout
    assert accepted.id[:8] in listed
    assert PROMPT in listed
    cancelled = run_engine("cancel", accepted.id[:8], *where)
    assert (cancelled.returncode, cancelled.stdout) == (0, f"cancelled {accepted.id}\n")
    again = run_engine("cancel", accepted.id[:8], *where)
    assert again.returncode == 2
    assert "it is cancelled" in again.stderr
    assert run_engine("cancel", "zzz", *where).returncode == 2
    rows = json.loads(run_engine("list", "--json", *where).stdout)
    assert {row["id"]: row["state"] for row in rows}[accepted.id] == "cancelled"


def test_the_memory_level_by_hand(engine_process: EngineProcess) -> None:
    """It is shown, and what the ready levels are; changed, in the status and in the trace's file; blocks that the model
    does not have are refused, and nothing has changed; auto is level 0 again on a CPU."""
    where = ("--socket", engine_process.socket)
    engine_process.wait_ready()
    shown = run_engine("memory", *where)
    assert shown.returncode == 0 and "cpu" in shown.stdout and "auto" in shown.stdout, shown.stderr
    changed = run_engine("memory", "3", "--blocks", "1", *where)
    assert "3, 1 block stays" in changed.stdout and "0 to 3" in changed.stdout, changed.stderr
    table, below = changed.stdout.split("\n\n")
    assert "ready levels" in table and below.startswith(
        "ready levels: a change to one of these holds from the next step"
    )
    refused = run_engine("memory", "3", "--blocks", "99", *where)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "blocks is 99, but the DiT of wan-demo has 6 blocks; it must be from 0 to 6" in refused.stderr
    assert "3, 1 block stays" in run_engine("status", *where).stdout
    (device,) = json.loads(run_engine("memory", "auto", "--json", *where).stdout)
    assert (device["plan"]["level"], device["mode"], device["copies"]["state"]) == (0, "auto", "complete")


def test_too_late_to_cancel(short_dir: Path) -> None:
    """The writer has the last frames, and is stopped: `cancel` says so, with exit code 2, and the video is made."""
    with EngineProcess(short_dir, placement="split") as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        writer = next(stage.pid for stage in client.status().stages if stage.name == "writer")
        assert writer is not None
        os.kill(writer, signal.SIGSTOP)
        wanted = {"prompt": PROMPT, "height": 32, "width": 32, "num_frames": 5, "steps": 2}
        identity = client.submit(**wanted, output=str(short_dir / "v.mp4")).id

        def decoded() -> bool:
            (task,) = [task for task in client.tasks() if task.id == identity]
            return task.phase == "decode" and task.step == task.steps

        try:
            wait_for(decoded, "the last frame to be decoded")
            ran = run_engine("cancel", identity[:8], "--socket", engine.socket)
        finally:
            os.kill(writer, signal.SIGCONT)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert f"too late to cancel {identity[:8]}: the end of its video is being written" in ran.stderr
        assert client.result(identity).path == str(short_dir / "v.mp4")
        assert (short_dir / "v.mp4").stat().st_size > 0


def test_more_threads_than_cores_are_told(nowhere: Path) -> None:
    """On stderr, before anything is started; here nothing is, as there are no weights."""
    ran = run_engine("serve", "--threads", "500", "--checkpoint", CONFIGS / "models", "--socket", nowhere)
    warning, error = ran.stderr.splitlines()
    cores = len(os.sched_getaffinity(0))
    assert f" WARNING threads is 500, but the engine may use {cores} core" in warning
    assert ran.returncode == 2 and "a directory without weights" in error


def test_a_start_that_several_ids_have_is_refused(engine_process: EngineProcess, tmp_path: Path) -> None:
    """`cancel` with a prefix of two unfinished requests cancels neither; with an empty one, nothing."""
    client = Client(engine_process.socket)
    wanted = {"prompt": PROMPT, "height": 32, "width": 32, "num_frames": 5, "steps": 1000}
    first: dict[str, str] = {}
    for n in range(17):  # of 17 ids, two begin with the same hexadecimal digit
        identity = client.submit(**wanted, output=str(tmp_path / f"{n}.mp4")).id
        if identity[0] in first:
            break
        first[identity[0]] = identity
    ran = run_engine("cancel", identity[0], "--socket", engine_process.socket)
    assert ran.returncode == 2
    assert "give more of the id" in ran.stderr
    assert run_engine("cancel", "", "--socket", engine_process.socket).returncode == 2
    for task in client.tasks():
        client.cancel(task.id)


def test_serve_says_when_it_is_ready_and_ends_on_sigterm(short_dir: Path) -> None:
    """One line on stdout when the stages are up, a line per request in the log; SIGTERM: exit code 0, the socket gone,
    no process left."""
    with EngineProcess(short_dir) as engine:
        engine.wait_ready()
        assert engine.output.startswith(f"engine {VERSION} serves wan-demo on {engine.socket} (ready in ")
        assert len(engine.output.splitlines()) == 1
        done = Client(engine.socket).generate(
            prompt=PROMPT, height=32, width=32, num_frames=5, steps=1, output=str(short_dir / "v.mp4")
        )
        assert f"{done.id} done after " in engine.log.read_text()
        assert any(line.startswith("loaded 9.") for line in engine.log.read_text().splitlines())
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(20) == 0
        assert not engine.socket.exists()
        assert not session_processes(engine.process.pid)


def test_a_second_serve_leaves_the_first_alone(short_dir: Path) -> None:
    """Exit code 2 and the pid of the one that runs, which still answers."""
    with EngineProcess(short_dir) as engine:
        ran = run_engine("serve", "--socket", engine.socket, "--state-dir", short_dir / "other")
        assert ran.returncode == 2
        assert f"already running on {engine.socket} (pid {engine.process.pid})" in ran.stderr
        assert Client(engine.socket).status().pid == engine.process.pid


def test_two_engines_cannot_share_a_journal(short_dir: Path) -> None:
    """Another socket but the same state directory: exit code 2, or both would make the same videos."""
    with EngineProcess(short_dir) as engine:
        ran = run_engine("serve", "--socket", short_dir / "other.sock", "--state-dir", short_dir / "state")
        assert ran.returncode == 2
        assert ran.stderr.endswith("another engine uses this state directory: give this one its own --state-dir\n")
        assert engine.listens()


def test_after_a_kill_the_path_can_be_served_again(short_dir: Path) -> None:
    """SIGKILL leaves a stale socket; the next `serve` removes it, and the stages of the killed one are gone."""
    with EngineProcess(short_dir) as engine:
        engine.kill()
        assert engine.socket.is_socket()
        with EngineProcess(short_dir) as again:
            assert Client(again.socket).status().pid == again.process.pid
        wait_for(lambda: not session_processes(engine.process.pid), "the first one's stages to leave")


def test_a_second_signal_ends_serve_at_once(short_dir: Path) -> None:
    """SIGINT, then SIGINT again while it waits for its stages: gone, and so are they."""
    with EngineProcess(short_dir) as engine:
        engine.process.send_signal(signal.SIGINT)
        engine.process.send_signal(signal.SIGINT)
        engine.exit_codes = (0, 130)
        assert engine.process.wait(10) in engine.exit_codes
        assert not engine.socket.exists()
        wait_for(lambda: not session_processes(engine.process.pid), "the stages to leave")


def test_shutdown_waits_for_what_was_accepted(short_dir: Path) -> None:
    """`engine shutdown` returns when the accepted request is done and the engine gone; new requests are refused."""
    with EngineProcess(short_dir) as engine:
        Client(engine.socket).submit(
            prompt=PROMPT, height=32, width=32, num_frames=5, steps=2, output=str(short_dir / "v.mp4")
        )
        ran = run_engine("shutdown", "--socket", engine.socket)
        assert ran.returncode == 0, ran.stderr
        assert "has stopped" in ran.stdout
        assert (short_dir / "v.mp4").stat().st_size > 0
        assert engine.process.wait(10) == 0
        assert not engine.socket.exists()


def test_shutdown_now_keeps_requests_in_the_journal(short_dir: Path) -> None:
    """`--now` does not wait, also while a draining shutdown does; the next engine has the request."""
    with EngineProcess(short_dir) as engine:
        accepted = Client(engine.socket).submit(
            prompt=PROMPT, height=32, width=32, num_frames=5, steps=1000, output=str(short_dir / "v.mp4")
        )
        draining = subprocess.Popen(
            command("shutdown", "--socket", engine.socket), stdout=subprocess.DEVNULL, env=environment()
        )
        wait_for(lambda: not Client(engine.socket).status().accepting, "draining to begin")
        ran = run_engine("shutdown", "--now", "--socket", engine.socket)
        assert ran.returncode == 0, ran.stderr
        assert draining.wait(10) == 0
        assert engine.process.wait(10) == 0
    with EngineProcess(short_dir) as again:
        assert [task.id for task in Client(again.socket).tasks()] == [accepted.id]


def test_a_configuration_file_and_options_over_it(short_dir: Path) -> None:
    """YAML of SystemParams; an option of the command line wins; an unknown key is an error with the nearest one."""
    config = short_dir / "system.yaml"
    config.write_text("placement: split\nmax_queue: 1\n")
    with EngineProcess(short_dir, "--config", config) as engine:
        stages = Client(engine.socket).status().stages
        assert len({stage.pid for stage in stages}) == 1, "--placement fused wins over the file"
        client = Client(engine.socket)
        wanted = {"prompt": PROMPT, "steps": 1000}
        client.submit(**wanted, output=str(short_dir / "1.mp4"))
        with pytest.raises(Exception, match="limit"):
            client.submit(**wanted, output=str(short_dir / "2.mp4"))
    config.write_text("placment: fused\n")
    ran = run_engine("serve", "--config", config, "--socket", short_dir / "other.sock")
    assert ran.returncode == 2
    assert "system.yaml has an unknown field 'placment'; did you mean 'placement'?" in ran.stderr


def test_models_lists_every_model() -> None:
    """A row per YAML, with its usual size and whether its weights are here."""
    ran = run_engine("models")
    assert ran.returncode == 0
    for name in list_models():
        assert name in ran.stdout
    cards = {card["name"]: card for card in json.loads(run_engine("models", "--json").stdout)}
    assert sorted(cards) == list_models()
    assert cards["wan-demo"]["weights_bytes"] > 1_000_000
    assert (cards["wan-demo"]["width"], cards["wan-demo"]["height"]) == (96, 96)


def test_version_and_help() -> None:
    """`version` has the engine's and the protocol's; `--help` names every command; an unknown one is exit code 2."""
    assert run_engine("version").stdout.startswith(f"engine {VERSION}, protocol 1, Python 3.")
    ran = run_engine("--help")
    for name in ("generate", "serve", "status", "list", "cancel", "models", "check", "shutdown", "version"):
        assert name in ran.stdout
    assert run_engine("fly").returncode == 2


def test_the_command_line_and_the_library_start_quickly() -> None:
    """`engine --help` and `import engine` load neither torch nor numpy, the library no rich, typer or uvloop either."""
    code = "import sys; from engine import {}; print([m for m in {!r} if m in sys.modules])"
    heavy = ["torch", "transformers", "numpy", "av"]
    for what, names in (("cli", heavy), ("Supervisor, Client, AsyncClient", [*heavy, "rich", "typer", "uvloop"])):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(what, names)],
            capture_output=True,
            text=True,
            env=environment(),
            check=True,
        )
        assert ran.stdout.strip() == "[]"
