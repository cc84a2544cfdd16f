"""Checkpoints that are damaged in 300 ways, or while they are read: refused by the name of a file or tensor, before
anybody computes with them, and nothing of them is left."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_components
from engine.models import load_model
from engine.params import SystemParams
from engine.resident import resident_bytes
from engine.tasks import KEPT_FINISHED
from hotreload.safetensors_file import read_header
from ipc.channel import Channel, close_fds
from ipc.errors import BadCheckpoint
from ipc.messages.loader import AnyLoaderReport, Read
from stages.loader import MAX_MANIFEST, read_all
from tests.conftest import until
from tests.engine.reloading import FILES, FIRST, engine, order, placed, video
from tools.load import Footprint, children

MODEL = load_model("wan-demo")
MOST_GROWN = 8 << 20
"""Bytes of resident memory, over the cases after `KEPT_FINISHED`: until then the engine keeps every task."""

LEAST = {"text_encoder": 80, "transformer": 200, "vae": 180}
"""Cases that there must have been: all tensors' boundaries among them."""

SMALLEST = {"steps": 1, "num_frames": 1, "guidance_scale": 1.0}
"""Of a request whose video is compared after each case."""

OTHER_MODEL = r"is not that of wan-demo: \w+ is \d+, expected \d+|is not a Wan \w+: [\w.]+ is missing or misshaped"
"""What is said where a tensor in the place of another makes a header that is of another model, or of none."""

Damage = Callable[[Path], str]
"""Damages a file; a pattern of the refusal."""


class Here(Channel[Read]):
    """The loader's end of a channel, whose first report of what is read is when `meanwhile` happens."""

    def __init__(self, sock: socket.socket, meanwhile: Callable[[], None]) -> None:
        super().__init__(sock, Read)
        self._meanwhile: Callable[[], None] | None = meanwhile

    def try_send(self, *message: Any) -> bool:
        if self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        return super().try_send(*message)


def load(
    directory: Path, component: str, manifest: Path | None = None, meanwhile: Callable[[], None] = lambda: None
) -> list[str]:
    """What a reload does with it until the stages hear of it: content hashes of what was placed. Raises as that."""
    components = open_components(MODEL, SystemParams(model="wan-demo"), directory, [component])
    asked = Read(
        supervisor_pid=os.getpid(), components=list(components.values()), devices={component: ["cpu"]},
        manifest=None if manifest is None else str(manifest), dtype="float32", transformer=MODEL.transformer,
        vae=MODEL.vae, text_encoder=MODEL.text_encoder, image_encoder=None,
    )  # fmt: skip
    ours, theirs = Channel.pair()
    with Here(theirs, meanwhile) as end, Channel[AnyLoaderReport](ours, AnyLoaderReport) as supervisor:
        try:
            read_all(asked, end, [])
        finally:
            placed = []
            while (received := supervisor.try_receive()) is not None:
                placed += [received.message.version.content] if received.fds else []  # type: ignore[union-attr]
                close_fds(received.fds)
        return placed


def refusal(directory: Path, component: str, *given: Any) -> str:
    """What a checkpoint is refused with; empty if it is not. Lets go of what the error holds."""
    try:
        load(directory, component, *given)
    except BadCheckpoint as error:
        return str(error)
    return ""


def footprint() -> Footprint:
    gc.collect()
    return Footprint.of_this_process()


def resident_of_stages() -> int:
    return sum(map(resident_bytes, children(os.getpid())))


# Ways to damage a file.


def cut_at(size: int) -> Damage:
    def damage(file: Path) -> str:
        os.truncate(file, size)
        return file.name

    return damage


def write_at(offset: int, data: bytes) -> Damage:
    def damage(file: Path) -> str:
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(data)
        return file.name

    return damage


def flip(offset: int, bit: int) -> Damage:
    def damage(file: Path) -> str:
        content = file.read_bytes()[offset]
        return write_at(offset, bytes([content ^ 1 << bit]))(file)

    return damage


def change(says: str, how: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(file: Path) -> str:
        tensors = load_file(file)
        how(tensors)
        save_file(tensors, file)
        return says

    return damage


def swap(one: str, other: str) -> Damage:
    def how(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change(f"{one}|{other}", how)


def spoil(name: str, value: float) -> Damage:
    def how(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return change(f"{name} has values that are not finite", how)


def retype(name: str, dtype: torch.dtype) -> Damage:
    def how(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change(name if dtype.itemsize > 1 else "fp8|supported", how)


def damages(component: str, dice: random.Random) -> Iterator[tuple[bool, Damage]]:
    """With a manifest or without, and what is done to the file."""
    file = FIRST / FILES[component]
    entries = read_header(file, component).entries
    names, start = [entry.name for entry in entries], entries[0].offset
    shapes = {entry.name: entry.shape for entry in entries}
    for entry in entries:
        yield False, cut_at(entry.offset)
    for length in (0, 7, 8, start - 1):
        yield False, cut_at(length)
    for length in (0, 2**63, 2**64 - 1, file.stat().st_size, start):
        yield False, write_at(0, length.to_bytes(8, "little"))
    for _ in range(10):
        yield True, flip(dice.randrange(start), dice.randrange(8))
        yield True, flip(dice.randrange(start, file.stat().st_size), dice.randrange(8))
    for name in dice.sample(names, 8):
        yield False, change(name, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        yield False, spoil(name, float("nan"))
        yield False, spoil(name, float("-inf"))
        other = next(n for n in dice.sample(names, len(names)) if shapes[n] != shapes[name])
        yield False, swap(name, other)
    for name in dice.sample(names, 4):
        yield False, retype(name, torch.int32)
    yield False, retype(names[0], torch.float8_e4m3fn)
    yield False, change("extra.weight", lambda tensors: tensors.update({"extra.weight": torch.zeros(3)}))
    alike = [n for n in names if sum(shapes[m] == shapes[n] for m in names) > 1]
    for name in dice.sample(alike, 2):
        other = next(n for n in alike if n != name and shapes[n] == shapes[name])
        yield True, lambda file, name=name, other=other: (swap(name, other)(file), file.name)[1]  # type: ignore[misc]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that may be damaged, and `sums` of its files as they should be."""
    directory = shutil.copytree(FIRST, tmp_path / "c", ignore=shutil.ignore_patterns("revision-2"))
    lines = [f"{_sha256(directory / file)}  {file}\n" for file in FILES.values()]
    (directory / "sums").write_text("".join(lines))
    return directory


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.timeout(900)
async def test_damaged_files(checkpoint: Path, tmp_path: Path, dice: random.Random) -> None:
    """Each is refused, and what is wrong is named: by an engine that serves, whose next video is as before, and so is
    what it holds, and what its stages do."""
    cases = [(component, *damage) for component in FILES for damage in damages(component, dice)]
    counts = Counter(component for component, *_ in cases)
    assert all(counts[component] >= least for component, least in LEAST.items()), counts
    assert len(cases) >= KEPT_FINISHED + 250
    async with engine(placement="fused") as supervisor:
        golden = await video(supervisor, tmp_path / "v.mp4", **SMALLEST)
        for component, file in FILES.items():  # what is loaded once for all readers, and stays
            spoil(next(iter(load_file(checkpoint / file))), float("nan"))(checkpoint / file)
            with pytest.raises(BadCheckpoint):
                await supervisor.reload(order(checkpoint, component))
            shutil.copyfile(FIRST / file, checkpoint / file)
        held, versions, before, stages = placed(supervisor), supervisor.versions(), footprint(), 0
        for number, (component, with_manifest, damage) in enumerate(cases):
            file, manifest = checkpoint / FILES[component], str(checkpoint / "sums") if with_manifest else None
            says = damage(file)
            with pytest.raises(BadCheckpoint) as caught:
                await supervisor.reload(order(checkpoint, component, manifest=manifest))
            refused = str(caught.value)
            named = re.search(says, refused) or re.search(OTHER_MODEL, refused)
            assert component in refused and named, f"case {number}: {refused}"
            assert await video(supervisor, tmp_path / "v.mp4", **SMALLEST) == golden, f"case {number}: {refused}"
            assert placed(supervisor) == held, f"case {number}: {refused}"
            shutil.copyfile(FIRST / FILES[component], file)
            if number == KEPT_FINISHED:
                before, stages = footprint(), resident_of_stages()
        served = [msgspec.structs.replace(v, served=v.served + len(cases)) for v in versions]
        await until(lambda: supervisor.versions() == served, "the last video is dropped everywhere")
        after = footprint()
        grown = before.grown(after)
        assert grown.pop("threads", 0) < 8, "those that asyncio keeps for blocking calls"
        assert grown == {}
        assert after.resident - before.resident < MOST_GROWN
        assert resident_of_stages() - stages < MOST_GROWN
    print(counts)


@pytest.mark.parametrize("component", FILES)
def test_files_that_change_while_they_are_read(checkpoint: Path, tmp_path: Path, component: str) -> None:
    """Replaced, written to and given back their times, cut short, gone: never a SIGBUS, nor a mix of two."""
    file = checkpoint / FILES[component]
    other = tmp_path / "other"

    def replace() -> None:
        os.replace(other, file)

    def write() -> None:
        status = file.stat()
        flip(status.st_size - 1, 0)(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def cut() -> None:
        os.truncate(file, file.stat().st_size // 2)

    for meanwhile in (replace, write, cut, file.unlink):
        file.unlink()
        shutil.copyfile(FIRST / FILES[component], file)
        shutil.copyfile(FIRST / FILES[component], other)
        before = footprint()
        refused = refusal(checkpoint, component, None, meanwhile)
        assert re.search(f"{component}.*{file.name}.*(changed|cut short|cannot be read)", refused), refused
        assert before.grown(footprint()) == {}
        if not file.exists():
            shutil.copyfile(FIRST / FILES[component], file)


def test_a_manifest_must_name_every_file(checkpoint: Path) -> None:
    sums = checkpoint / "sums"
    sums.write_text("\n".join(sums.read_text().splitlines()[1:]))
    with pytest.raises(BadCheckpoint, match=r"text_encoder: model.safetensors is not in the manifest sums"):
        load(checkpoint, "text_encoder", sums)
    os.truncate(sums, MAX_MANIFEST + 1)
    with pytest.raises(BadCheckpoint, match=f"sums cannot be read: it has more than {MAX_MANIFEST} bytes"):
        load(checkpoint, "vae", sums)
    sums.unlink()
    with pytest.raises(BadCheckpoint, match="the manifest sums cannot be read"):
        load(checkpoint, "vae", sums)


@pytest.mark.parametrize("kind", ["a FIFO", "a device"])
def test_a_manifest_is_a_file(checkpoint: Path, kind: str) -> None:
    """What would never end, or never begin, is refused at once."""
    manifest = Path("/dev/zero") if kind == "a device" else checkpoint / "sums"
    if kind == "a FIFO":
        manifest.unlink()
        os.mkfifo(manifest)
    with pytest.raises(BadCheckpoint, match=f"the manifest {manifest.name} cannot be read: it is {kind}"):
        load(checkpoint, "text_encoder", manifest)
