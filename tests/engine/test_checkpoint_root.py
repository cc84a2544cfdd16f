"""Where weights may be read from: below `--checkpoint-root`, whatever a path looks like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine.checkpoint import open_components, open_model
from engine.loras import Loras
from engine.models import CONFIGS, load_model
from engine.params import SystemParams
from ipc.errors import BadCheckpoint, BadConfig
from ipc.messages.client import Canary
from tests.engine.test_security import leaks
from tests.engine.traps import World
from tests.engine.wire import EngineProcess, RawClient, frame, run_engine

MODEL = load_model("wan-demo")
LORA = "l.safetensors"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Traps in a root, which is the working directory, and a good checkpoint outside it, wherever they lead."""
    world = World(tmp_path.resolve())
    for place in (world.outside, world.outside / "b", tmp_path, tmp_path / "root-evil", world.root / "good"):
        for name in ("vae", "transformer", "text_encoder", "tokenizer"):
            shutil.copytree(CONFIGS / "demo" / name, place / name)
        (place / LORA).touch()
    monkeypatch.chdir(world.root)
    yield world


def opened(path: str, root: str) -> bool:
    """Whether a checkpoint is taken; if it is not, the error says nothing of where it would have been."""
    try:
        open_components(MODEL, SystemParams(checkpoint_root=root), Path(path), ["vae"])
    except (BadConfig, BadCheckpoint) as error:
        assert not leaks(str(error).replace("...", ""), path), error  # a long path is cut
        return False
    return True


def test_no_checkpoint_is_read_outside_the_root(world: World) -> None:
    """Hundreds of ways out are refused. The control: without a root, many of them lead to a checkpoint."""
    ways = list(world.directories())
    assert len(ways) > 200
    assert [way for way in ways if opened(way, str(world.root))] == []
    assert sum(opened(way, "/") for way in ways) > 60


def test_no_lora_is_read_outside_the_root(world: World) -> None:
    """The same of LoRA files: every way that leads to the file outside is refused before anything is started."""

    async def keep(kept: object) -> None:
        raise AssertionError("nothing was added")

    loras = Loras(MODEL, str(world.root), list, keep)
    outside = [place / LORA for place in (world.outside, world.outside / "b", world.root.parent)]
    ways = [f"{way}/{LORA}" for way in world.directories() if "\0" not in way and "\ud800" not in way]
    escapes = [way for way in ways if any(os.path.exists(way) and os.path.samefile(way, file) for file in outside)]
    assert len(escapes) > 50
    for way in [*escapes, "/etc/passwd", "/dev/zero", "/proc/self/mem"]:
        with pytest.raises(BadConfig, match="outside the directory that weights are read from"):
            loras._asked([way])
    assert loras._asked([f"good/{LORA}"]).files == [str(world.root / "good" / LORA)]


def test_a_link_in_a_checkpoint_leads_nowhere_else(world: World) -> None:
    """A directory in the root whose file is a link out of it, and a link that stays, as in a cache of downloads."""
    for name, target in (("bad", world.outside), ("cached", world.root / "good")):
        (world.root / name / "vae").mkdir(parents=True)
        for file in (target / "vae").iterdir():
            (world.root / name / "vae" / file.name).symlink_to(file)
    assert not opened("bad", str(world.root))
    assert opened("bad", "/")
    assert opened("cached", str(world.root))


def test_what_an_engine_is_started_with(world: World) -> None:
    """A checkpoint or a LoRA outside the root is refused; one below it, or what ships, is taken."""
    system = SystemParams(checkpoint_root=str(world.root))
    assert open_model(MODEL, system).components
    assert open_model(MODEL, msgspec.structs.replace(system, checkpoint=str(world.root / "good"))).components
    for wrong in ({"checkpoint": str(world.outside)}, {"lora": (f"{world.outside / LORA}:0.5",)}):
        with pytest.raises(BadConfig, match="outside the directory that weights are read from"):
            open_model(MODEL, msgspec.structs.replace(system, **wrong))  # type: ignore[arg-type]
    ran = run_engine("serve", "--checkpoint-root", world.root, "--checkpoint", world.outside)
    assert ran.returncode == 2 and "--checkpoint-root" in ran.stderr


def test_a_running_engine(world: World, short_dir: Path) -> None:
    """A reload, its manifest and its reference, and a LoRA: refused when they are outside; a reload from below the root
    is carried out."""
    good, params = str(world.root / "good"), msgspec.Raw(msgspec.msgpack.encode({"prompt": "x"}))
    manifest, reference = str(world.outside / "sums"), str(world.outside / "victim.mp4")
    with (
        EngineProcess(short_dir, "--checkpoint-root", world.root, "--output-root", world.root) as engine,
        RawClient(engine.socket) as client,
    ):
        engine.wait_ready()
        for message, code in (
            (frame(type="reload", ref=1, checkpoint=str(world.outside)), "bad_config"),
            (frame(type="reload", ref=1, checkpoint=good, manifest=manifest), "bad_config"),
            (frame(type="reload", ref=1, checkpoint=good, manifest="\0"), "bad_config"),
            (frame(type="lora_add", ref=1, name="x", files=[str(world.outside / LORA)]), "bad_config"),
            (
                frame(type="reload", ref=1, checkpoint=good, canary=Canary(params=params, reference=reference)),
                "bad_request",
            ),
        ):
            reply = client.ask(message)
            assert reply["type"] == "refused" and reply["error"]["code"] == code, reply
            assert "outside" in reply["error"]["message"] or "no path" in reply["error"]["message"]
        assert client.ask(frame(type="reload", ref=1, checkpoint=good))["type"] == "reloaded"
