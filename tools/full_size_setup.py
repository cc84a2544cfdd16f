"""What the tools with models of the full size share: options, checkpoints on the disk, an engine in processes of its
own, a report."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from engine.cuda import management_handle
from engine.models import CONFIGS, list_models, load_model
from engine.params import ModelParams
from hotreload.checkpoint import open_checkpoint
from ipc.messages.weights import Component
from tools.make_checkpoint import bytes_below, make_checkpoint, shrink, table_of, write_params

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle moves left on a black background"
READY_TIMEOUT = 420.0
"""Seconds for all weights to be read."""
GENERATE_TIMEOUT = 480.0
STOP_TIMEOUT = 60.0
SPARE = 2_000_000_000
"""Bytes to leave free beside the checkpoints."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """--size, --device, --work and --out."""
    parser.add_argument("--size", help="WIDTHxHEIGHTxFRAMES [the model's]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "full-size", help="checkpoints")
    parser.add_argument("--out", type=Path, help="what is found goes there, as text")


def size_of(text: str | None) -> dict[str, Any]:
    """What --size says of a request; empty: nothing."""
    names = ("width", "height", "num_frames")
    return {} if text is None else dict(zip(names, map(int, text.split("x")), strict=True))


class Report:
    """Lines that are printed, and written to `path`, as they come; and checks, which decide the exit status.

    In the file, the directory `work` is called WORK.
    """

    def __init__(self, title: str, path: Path | None, work: Path, tool: str = "full_size") -> None:
        self.checks: list[tuple[bool, str]] = []
        self._path, self._work = path, work
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        self.say(f"$ python -m tools.{tool} {title}")

    def say(self, line: str) -> None:
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line.replace(str(self._work), "WORK").rstrip() + "\n")

    def check(self, passed: bool, what: str) -> None:
        """A claim that this run is there to prove."""
        self.checks.append((passed, what))
        self.say(f"{'ok  ' if passed else 'FAIL'} {what}")


class Workplace:
    """Checkpoints and output files below one directory; what is there is used again.

    With `shrunken`, all models are tiny ones of the same structure, known to an installation of the engine made here.
    """

    def __init__(self, directory: Path, shrunken: bool, device: str) -> None:
        self.directory, self.shrunken, self.device = directory, shrunken, device
        directory.mkdir(parents=True, exist_ok=True)
        self.installation = self._install_shrunken() if shrunken else ROOT

    def model(self, name: str) -> ModelParams:
        return shrink(load_model(name)) if self.shrunken and name != "wan-demo" else load_model(name)

    def checkpoint(self, report: Report, name: str) -> Path | None:
        """A Diffusers directory in bfloat16 with random weights; None for the model that ships with its own.

        Networks of the same numbers are made once and linked, the second expert of a model to its first one too.
        """
        model = self.model(name)
        if model.checkpoint is not None:
            return None
        directory = self.directory / name
        if directory.is_dir():
            return directory
        began = time.perf_counter()
        self._make_room(report, model, model.components)
        partial = directory.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for component in model.components:
            (partial / component).mkdir(parents=True)
            for file in self._made(model, component.removesuffix("_2")).iterdir():
                os.link(file, partial / component / file.name)
        make_checkpoint(model, partial, "diffusers", only=())
        partial.rename(directory)
        size, seconds = bytes_below(directory) / 1e9, time.perf_counter() - began
        linked = "; both experts are the same files, linked" if model.boundary is not None else ""
        report.say(f"checkpoint: {size:.2f} GB of random bfloat16 weights, ready in {seconds:.1f} s{linked}")
        return directory

    def network(self, report: Report, name: str, component: str) -> Component:
        """One network of a model alone, in bfloat16 with random weights."""
        model = self.model(name)
        self._make_room(report, model, (component,))
        return open_checkpoint(self._made(model, component).parent, (component,)).components[component]

    def _made(self, model: ModelParams, component: str) -> Path:
        """The directory of one network's files, made if it is not there."""
        part = self._part(model, component)
        if not part.is_dir():
            partial = part.with_name(f"{part.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make_checkpoint(model, partial, "diffusers", dtype=torch.bfloat16, only=(component,))
            partial.rename(part)
        return part / component

    def _part(self, model: ModelParams, component: str) -> Path:
        key = hashlib.sha256(repr(table_of(model, component)).encode()).hexdigest()[:12]
        return self.directory / "parts" / key

    def _make_room(self, report: Report, model: ModelParams, components: tuple[str, ...]) -> None:
        """Remove what other models have, if what is missing of this one would not fit beside it."""
        wanted = {component.removesuffix("_2") for component in components}
        parts = {self._part(model, component): component for component in wanted}
        missing = [component for part, component in parts.items() if not part.is_dir()]
        needed = SPARE + sum(2 * math.prod(s) for c in missing for s in table_of(model, c).values())
        if shutil.disk_usage(self.directory).free >= needed:
            return
        others = [self.directory / name for name in list_models()]
        others += set((self.directory / "parts").glob("*")) - parts.keys()
        for directory in filter(Path.is_dir, others):
            shutil.rmtree(directory)
        free = shutil.disk_usage(self.directory).free
        report.say(f"removed other checkpoints to make room: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")

    def picture(self) -> Path:
        """A picture with a gradient and a disc."""
        path = self.directory / "picture.png"
        rows, columns = np.mgrid[0:480, 0:832]
        disc = (rows - 240) ** 2 + (columns - 500) ** 2 < 100**2
        pixels = np.stack([columns * 255 // 831, rows * 255 // 479, np.where(disc, 255, 40)], axis=-1).astype(np.uint8)
        with av.open(str(path), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 832, 480, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    def _install_shrunken(self) -> Path:
        """A copy of the engine whose `configs/models` are the tiny models."""
        root = self.directory / "installation"
        shutil.rmtree(root, ignore_errors=True)
        for package in ("engine", "stages", "ipc", "hotreload"):
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "configs").mkdir()
        (root / "configs" / "demo").symlink_to(CONFIGS / "demo")
        for name in list_models():
            write_params(self.model(name), root / "configs" / "models" / f"{name}.yaml")
        return root


class Video(NamedTuple):
    """What came of a request: frames [frames, height, width, 3], the metadata, seconds from command to file."""

    frames: np.ndarray[Any, np.dtype[np.uint8]]
    metadata: dict[str, Any]
    seconds: float


class Served:
    """`engine serve` for one model; every request is an `engine generate` of its own.

    Resource handling: owns the server's process between `with` and its end.
    Error handling: what a command writes on stderr is in the RuntimeError of its failure.
    """

    def __init__(self, workplace: Workplace, report: Report, name: str) -> None:
        self._workplace, self._report, self._name = workplace, report, name
        self._run = workplace.directory / f"run-{os.getpid()}-{time.monotonic_ns()}"
        self._run.mkdir(mode=0o700)
        self._socket = self._run / "e.sock"
        checkpoint = workplace.checkpoint(report, name)
        where = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        self._command = ["serve", "--model", name, "--device", workplace.device, *where]
        self._log = self._run / "log"

    def __enter__(self) -> Served:
        words = [*self._command, "--socket", str(self._socket), "--state-dir", str(self._run / "state")]
        self._report.say(f"$ engine {' '.join(self._command)}")
        with self._log.open("wb") as log, (self._run / "out").open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine", *words], stdout=out, stderr=log, env=self._environment,
                cwd=self._workplace.installation,
            )  # fmt: skip
        try:
            self._report.say(self._wait_ready())
        except BaseException:
            self._stop(signal.SIGKILL)
            raise
        for line in self._log.read_text().splitlines():
            if line.startswith("loaded"):
                self._report.say(line)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        code = self._stop(signal.SIGTERM)
        if kind is None:
            self._report.check(code == 0, f"engine serve ended with status {code}")
        else:
            self._report.say(self._log.read_text()[-3000:])
        shutil.rmtree(self._run)

    def generate(self, **options: object) -> Video:
        """One request by its options, as on the command line. Says how long each stage took."""
        out = self._run / f"{time.monotonic_ns()}.mp4"
        words = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        command = ["generate", PROMPT, *words]
        began = time.perf_counter()
        ran = subprocess.run(
            [sys.executable, "-m", "engine", *command, "--out", str(out), "--socket", str(self._socket), "--json"],
            capture_output=True, text=True, env=self._environment, cwd=self._workplace.installation, check=False,
            timeout=GENERATE_TIMEOUT,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        if ran.returncode != 0:
            self._report.say(said := ran.stderr[-2000:].strip())
            raise RuntimeError(f"engine generate {' '.join(words)}: {said.rpartition(chr(10))[2]}")
        metadata = json.loads(ran.stdout)["metadata"]
        frames = read_frames(out)
        out.unlink()
        self._say_stages(words, seconds, metadata)
        return Video(frames, metadata, seconds)

    def _say_stages(self, words: list[str], seconds: float, metadata: dict[str, Any]) -> None:
        stages = ", ".join(f"{phase} {spent:.2f}" for phase, spent in metadata["seconds"].items())
        parameters = metadata["parameters"]
        size = f"{parameters['width']}x{parameters['height']}x{parameters['num_frames']}"
        memory = (
            f"; GPU memory in use {used / 2**30:.1f} GiB" if (used := gpu_memory_used(self._workplace.device)) else ""
        )
        self._report.say(f"$ engine generate ... {' '.join(words)}")
        self._report.say(f"{size}, {parameters['steps']} steps: {seconds:.1f} s; seconds of {stages}{memory}")

    @property
    def _environment(self) -> dict[str, str]:
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self._workplace.installation), *inherited])}

    def _wait_ready(self) -> str:
        end = time.monotonic() + READY_TIMEOUT
        while not (out := (self._run / "out").read_text()).endswith(")\n"):
            if self._process.poll() is not None or time.monotonic() > end:
                self._report.say(said := self._log.read_text()[-3000:].strip())
                raise RuntimeError(f"engine serve did not come up: {said.rpartition(chr(10))[2]}")
            time.sleep(0.05)
        return out.strip().replace(str(self._run), "...")

    def _stop(self, number: signal.Signals) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def read_frames(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The frames of a video, [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def gpu_memory_used(device: str) -> int:
    """Bytes in use on a GPU, by all processes; 0 on a CPU."""
    if device == "cpu":
        return 0
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(management_handle(device)).used)
    finally:
        pynvml.nvmlShutdown()


def machine(device: str) -> list[str]:
    """What the figures hold for: the device, the driver, the versions."""
    names = ("torch", "transformers", "diffusers", "av", "msgspec", "xxhash")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = [f"Python {platform.python_version()}, {versions}", f"{os.cpu_count()} cores, {_memory_gb():.0f} GB memory"]
    if device != "cpu":
        import pynvml

        pynvml.nvmlInit()
        handle = management_handle(device)
        total = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
        name, driver = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        lines.insert(0, f"{name}, {total:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}")
    return lines


def _memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
