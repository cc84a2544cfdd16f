"""What the engine costs: start, one request, and ten queued requests against the same stages in one process.

    python tools/bench_engine.py --out docs/results/engine-cpu.txt

The baseline calls the same stages' functions in one process, one after another for each request: no queues, no
supervisor. "whole clip, all cores" is the same with the VAE's decode in one call and torch's own choice of threads.
They and the engine (split and fused) take turns, each turn in a fresh process that has run two requests to warm up;
ratios are of the turns side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools.machine import cpu_name

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle moves left on a black background"
REQUESTS = 10
WARMUP = 2


def baseline(folder: Path, threads: int, whole: bool) -> float:
    """Seconds for `REQUESTS` requests, one after another, in this process; `whole`: decode each clip in one call."""
    import torch

    from engine.memory import DECODE_LATENTS
    from engine.models import CONFIGS, load_model
    from hotreload.checkpoint import open_checkpoint
    from hotreload.weights import load_weights
    from stages import sampling, solvers
    from stages.models import text_encoder
    from stages.models.transformer import WanTransformer
    from stages.models.vae import WanVae
    from stages.prompt import load_tokenizer, prompt_ids
    from stages.vae_clips import to_frames
    from stages.writer import Video

    torch.set_num_threads(threads)
    model, directory = load_model("wan-demo"), CONFIGS / "demo"
    with torch.device("meta"):
        encoder, dit = text_encoder.build(model.text_encoder), WanTransformer(model.transformer)
        vae = WanVae(model.vae)
    checkpoint = open_checkpoint(directory, model.components)
    for module, name in ((encoder, "text_encoder"), (dit, "transformer"), (vae, "vae")):
        component = checkpoint.components[name]
        load_weights(module, component, dtype=lambda key: torch.float32, aliases=text_encoder.ALIASES)
    tokenizer = load_tokenizer(str(checkpoint.tokenizer))

    def embed(text: str) -> torch.Tensor:
        (rows,) = text_encoder.encode(encoder, prompt_ids(tokenizer, text, model.transformer.text_len))
        padded = torch.nn.functional.pad(rows, (0, 0, 0, model.transformer.text_len - len(rows)))
        return dit.encode_prompt(padded.unsqueeze(0))

    def generate(number: int) -> None:
        job = make_job(folder / f"{number}.mp4", number)
        schedule, shape = sampling.schedule_of(job), sampling.latent_shape(job, model.vae)
        latents = sampling.get_noise(job.seed, shape)
        prompts = torch.cat([embed(job.prompt), embed(job.negative_prompt)], dim=2)
        times = dit.encode_time(sampling.timesteps_of(schedule, False, "cpu"))
        context = sampling.Context(prompts, dit.rope(*shape[1:]), times)
        history = solvers.new_state(schedule, latents)
        for index in range(schedule.steps):
            velocity = sampling.predict(dit, latents, index, context, job.guidance_scale)
            latents, history = solvers.step(schedule, index, velocity, latents, history)
        video, cache = Video(job), {}
        for chunk in latents.unsqueeze(0).split(shape[1] if whole else DECODE_LATENTS, dim=2):
            video.add(to_frames(vae.decode_chunk(chunk, cache)).numpy())
        video.complete({}, lambda: None)
        video.close()

    with torch.inference_mode():
        return timed(generate)


def timed(generate: Callable[[int], None]) -> float:
    """Seconds of `REQUESTS` calls after `WARMUP`."""
    for number in range(WARMUP):
        generate(1000 + number)
    began = time.perf_counter()
    for number in range(REQUESTS):
        generate(number)
    return time.perf_counter() - began


def make_job(output: Path, seed: int):  # type: ignore[no-untyped-def]
    """The job of the engine's own admission for the demo request."""
    from engine.admission import admit
    from engine.models import load_model
    from engine.params import SystemParams, UserParams

    return admit(UserParams(prompt=PROMPT, seed=seed, output=str(output)), load_model("wan-demo"), SystemParams())


async def engine(folder: Path, placement: str, threads: int) -> tuple[float, float]:
    """Seconds for `REQUESTS` queued requests; median seconds of one alone."""
    from engine import Supervisor, SystemParams, UserParams

    params = SystemParams(placement=placement, threads=threads)  # type: ignore[arg-type]
    async with Supervisor(params) as supervisor:

        async def request(number: int) -> float:
            began = time.perf_counter()
            await supervisor.generate(UserParams(prompt=PROMPT, seed=number, output=str(folder / f"{number}.mp4")))
            return time.perf_counter() - began

        for number in range(WARMUP):
            await request(1000 + number)
        began = time.perf_counter()
        await asyncio.gather(*(request(number) for number in range(REQUESTS)))
        together = time.perf_counter() - began
        return together, statistics.median([await request(2000 + number) for number in range(5)])


def turn(what: str, threads: int, wait_policy: str) -> list[float]:
    """One turn in a fresh process; the figures it prints."""
    ran = subprocess.run(
        [sys.executable, __file__, "--turn", what, "--threads", str(threads)],
        env={**os.environ, "OMP_WAIT_POLICY": wait_policy, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(x) for x in ran.stdout.split()]


def supervisor_figures() -> tuple[float, float]:
    """Median seconds to import `Supervisor` in a fresh interpreter, and its resident MB."""
    code = (
        "import time; t = time.perf_counter(); from engine import Supervisor; t = time.perf_counter() - t; "
        "import os; print(t, int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6)"
    )
    rows = []
    for _ in range(5):
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        rows.append([float(x) for x in ran.stdout.split()])
    return statistics.median(r[0] for r in rows), statistics.median(r[1] for r in rows)


def cold_seconds(folder: Path) -> list[float]:
    """`engine generate` from command to finished file, no server running, five times."""
    seconds = []
    for number in range(5):
        command = [sys.executable, "-m", "engine", "generate", PROMPT, "--out", str(folder / f"cold{number}.mp4")]
        began = time.perf_counter()
        subprocess.run([*command, "--socket", str(folder / "none.sock")], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def served_seconds(folder: Path) -> list[float]:
    """`engine generate` against a running server, from command to finished file, five times."""
    socket = str(folder / "e.sock")
    module = [sys.executable, "-m", "engine"]
    server = subprocess.Popen(
        [*module, "serve", "--socket", socket, "--state-dir", str(folder / "state")],
        cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    seconds = []
    try:
        assert server.stdout is not None
        server.stdout.readline()
        for number in range(6):
            began = time.perf_counter()
            command = [*module, "generate", PROMPT, "--out", str(folder / f"warm{number}.mp4"), "--socket", socket]
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            seconds.append(time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait(20)
    return seconds[1:]


def report(turns: int, threads: int, folder: Path) -> list[str]:
    """All figures as lines of text."""
    import torch

    lines = [
        f"$ python tools/bench_engine.py --turns {turns} --threads {threads}",
        f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, wan-demo at its defaults, "
        f"{threads} compute thread(s)",
        "",
    ]
    seconds, megabytes = supervisor_figures()
    lines.append(f"from engine import Supervisor: {seconds:.3f} s, {megabytes:.0f} MB resident (median of 5)")
    lines.append("engine generate, cold, s: " + spread(cold_seconds(folder)))
    lines.append("engine generate, on a running server, s: " + spread(served_seconds(folder)))
    lines += ["", f"{REQUESTS} queued requests, seconds, in turns ({turns}):"]
    cores = len(os.sched_getaffinity(0))
    contenders = {"baseline": (threads, "PASSIVE"), "whole clip, all cores": (cores, "ACTIVE")}
    contenders |= dict.fromkeys(("split", "fused"), (threads, "PASSIVE"))
    names = list(contenders)
    rows: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {"split": [], "fused": []}
    for _ in range(turns):
        for name in names:
            figures = turn(name.split()[0], *contenders[name])
            rows[name].append(figures[0])
            if name in alone:
                alone[name].append(figures[1])
    for name in names:
        ratios = [a / b for a, b in zip(rows[name], rows["baseline"], strict=True)]
        lines.append(f"  {name:22} {spread(rows[name])}   over baseline {spread(ratios)}")
    lines += [f"one request alone, {name}, s: {spread(values)}" for name, values in alone.items()]
    return lines


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.3f} (min {min(values):.3f}, max {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender [5]")
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, len(os.sched_getaffinity(0)) // 2),
        help="compute threads [half the cores]",
    )
    parser.add_argument("--out", type=Path, help="also write the text here")
    parser.add_argument("--turn", choices=["baseline", "whole", "split", "fused"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.turn in ("baseline", "whole"):
            print(baseline(folder, args.threads, args.turn == "whole"))
        elif args.turn:
            print(*asyncio.run(engine(folder, args.turn, args.threads)))
        else:
            text = "\n".join(report(args.turns, args.threads, folder)) + "\n"
            print(text, end="")
            if args.out is not None:
                args.out.write_text(text)


if __name__ == "__main__":
    main()
