"""Time of loading weights against that of reading the same files with dd.

    python -m tools.bench_load --gigabytes 4 --folder /tmp/bench-load --out docs/results/load-cpu.txt

Random weights with the sizes of a 14B DiT, once in float32 and once in bfloat16, in shards of 1 GB, are written to the
folder if they are not there. Then, for each: dd to /dev/null, dd to a new file in memory (/dev/shm), and the loader,
all in turn, `--rounds` times with the files in the page cache (warm) and as often after they were dropped from it
(cold); the medians are shown. Every load is done in a process of its own, whose memory is new to it; its clock runs
from the first byte of a header to the last of the weights, without starting Python and importing torch.

dd to /dev/null never writes to memory that the kernel must first find and clear; a loader has to, and dd to /dev/shm
does. `x null` and `x shm` are the times over those of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from hotreload.shards import weight_files
from hotreload.tables import component_table
from hotreload.weights import load_weights
from ipc.messages.weights import Component
from tools.machine import host_line

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 1_000_000_000
ROWS = 5120
BLOCK_DD = "8M"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
"""(stored, loaded)."""


class Row(NamedTuple):
    """Seconds for one set of files."""

    what: str
    warm: float
    cold: float


def tensor_shapes(total: int, item: int) -> dict[str, tuple[int, int]]:
    """Tensors of the sizes that a 14B DiT has, `total` bytes of `item` bytes each."""
    columns = (ROWS, ROWS, ROWS, ROWS, 13824, 13824)
    shapes: dict[str, tuple[int, int]] = {}
    while total > 0:
        shape = (ROWS, min(columns[len(shapes) % len(columns)], max(1, total // (ROWS * item))))
        shapes[f"blocks.{len(shapes)}.weight"] = shape
        total -= shape[0] * shape[1] * item
    return shapes


def write(directory: Path, total: int, stored: str) -> list[Path]:
    """The files of `total` bytes of weights in this dtype, written if they are not there."""
    dtype = DTYPES[stored]
    shapes = tensor_shapes(total, dtype.itemsize)
    index = directory / f"{STEM}.safetensors.index.json"
    if not index.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        noise = torch.randn(max(rows * columns for rows, columns in shapes.values())).to(dtype)
        shards: list[dict[str, torch.Tensor]] = [{}]
        for name, (rows, columns) in shapes.items():
            if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES:
                shards.append({})
            shards[-1][name] = noise[: rows * columns].view(rows, columns)
        names = [f"{STEM}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            save_file({key: tensor.clone() for key, tensor in shard.items()}, directory / name)
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return weight_files(directory, "", STEM)


def drop(files: list[Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def dd(files: list[Path], target: Path | None) -> float:
    """Seconds to read the files one after another, to /dev/null or to a new file in memory."""
    seconds = 0.0
    for file in files:
        output = "/dev/null" if target is None else str(target)
        if target is not None:
            target.unlink(missing_ok=True)
        begin = time.perf_counter()
        subprocess.run(["dd", f"if={file}", f"of={output}", f"bs={BLOCK_DD}", "status=none"], check=True)
        seconds += time.perf_counter() - begin
    if target is not None:
        target.unlink()
    return seconds


def load(files: list[Path], loaded: str) -> float:
    """Seconds of the loader, in a process of its own."""
    command = [sys.executable, "-m", "tools.bench_load", "--child", loaded, *map(str, files)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(ran.stdout)


def child(loaded: str, files: list[str]) -> None:
    """Load the files; print the seconds."""
    component = Component(name="transformer", files=files)
    with torch.device("meta"):
        module = nn.Module()
        module.blocks = nn.ModuleList(nn.Linear(c, r, bias=False) for r, c in tensor_shapes_of(component))
    dtype = DTYPES[loaded]
    begin = time.perf_counter()
    load_weights(module, component, dtype=lambda name: dtype)
    print(time.perf_counter() - begin)


def tensor_shapes_of(component: Component) -> list[tuple[int, int]]:
    """In the order of the blocks."""
    table = component_table(component)
    ordered = sorted(table.values(), key=lambda entry: int(entry.name.split(".")[1]))
    return [(entry.shape[0], entry.shape[1]) for entry in ordered]


def measure(files: list[Path], runs: dict[str, Callable[[], float]], rounds: int) -> list[Row]:
    """The medians of `rounds` of all runs in turn, with the files in the page cache and after they were dropped."""
    warm: dict[str, list[float]] = {what: [] for what in runs}
    cold: dict[str, list[float]] = {what: [] for what in runs}
    dd(files, None)
    for _ in range(rounds):
        for what, run in runs.items():
            warm[what].append(run())
    for _ in range(rounds):
        for what, run in runs.items():
            drop(files)
            cold[what].append(run())
    return [Row(what, statistics.median(warm[what]), statistics.median(cold[what])) for what in runs]


def table_of(files: list[Path], stored: str, rounds: int) -> list[str]:
    """Lines: dd and the loader on one set of files."""
    size = sum(file.stat().st_size for file in files) / 1e9
    memory = Path("/dev/shm") / f"bench-load-{os.getpid()}"
    runs: dict[str, Callable[[], float]] = {
        "dd of=/dev/null": lambda: dd(files, None),
        "dd of=/dev/shm/new": lambda: dd(files, memory),
    }
    for loaded in (to for kind, to in CASES if kind == stored):
        runs[f"loader, {stored} -> {loaded}"] = partial(load, files, loaded)
    rows = measure(files, runs, rounds)
    null, new = rows[:2]
    return [
        f"{size:5.2f}  {row.what:30} {row.warm:7.2f} {size / row.warm:6.2f} {row.warm / null.warm:6.2f} "
        f"{row.warm / new.warm:6.2f}  {row.cold:7.2f} {size / row.cold:6.2f} {row.cold / null.cold:6.2f} "
        f"{row.cold / new.cold:6.2f}"
        for row in rows
    ]


def system() -> str:
    """CPU, cores and versions."""
    return f"{host_line()}, torch {torch.__version__}; load average before: {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of float32 weights; half in bfloat16")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-load"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1:])
        return
    lines = [f"$ python -m tools.bench_load --gigabytes {options.gigabytes:g} --rounds {options.rounds}", system()]
    lines += ["seconds, GB/s, and times those of dd (goal: at most 1.3 x dd)", ""]
    lines += [
        f"{'GB':>5}  {'':30} {'warm s':>7} {'GB/s':>6} {'x null':>6} {'x shm':>6}  "
        f"{'cold s':>7} {'GB/s':>6} {'x null':>6} {'x shm':>6}"
    ]
    for stored, bytes_ in (("float32", options.gigabytes * 1e9), ("bfloat16", options.gigabytes * 5e8)):
        files = write(options.folder / f"{stored}-{options.gigabytes:g}", int(bytes_), stored)
        lines += table_of(files, stored, options.rounds)
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
