"""The commands of an operator who changes weights under a running engine: what they print, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.client import Client
from engine.operator import read_components
from tests.engine.reloading import FIRST, SECOND
from tests.engine.wire import EngineProcess, run_engine

REQUEST: dict[str, Any] = {
    "prompt": "a red circle moves left on a black background", "seed": 3, "steps": 4, "num_frames": 5,
    "height": 32, "width": 32,
}  # fmt: skip


class Operator:
    def __init__(self, engine: EngineProcess) -> None:
        self._socket = engine.socket

    def __call__(self, *arguments: str | Path) -> list[str]:
        """Lines of stdout."""
        ran = run_engine(*arguments, "--socket", self._socket)
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout.splitlines()

    def refused(self, *arguments: str | Path) -> str:
        """The one line of stderr."""
        ran = run_engine(*arguments, "--socket", self._socket)
        assert ran.returncode != 0 and ran.stdout == ""
        (line,) = ran.stderr.splitlines()
        return line

    def transformers(self) -> dict[str, list[str]]:
        """State -> the row of `engine versions`."""
        rows = [line.split() for line in self("versions") if line.startswith("transformer")]
        return {row[2]: row for row in rows}


@pytest.fixture
def operator(engine_process: EngineProcess) -> Operator:
    engine_process.wait_ready()
    return Operator(engine_process)


def test_an_afternoon(operator: Operator, engine_process: EngineProcess, short_dir: Path) -> None:
    """A dry run, a canary that is refused and one that is not, the versions, the same again, a rollback, all of it."""
    client = Client(engine_process.socket)
    first = client.status().weights["transformer"][:12]
    client.generate(**REQUEST, output=str(short_dir / "first.mp4"))
    (dry,) = operator("reload", "--checkpoint", SECOND, "--component", "transformer", "--dry-run")
    assert dry.startswith("transformer: would become ")
    second = dry.split()[-1]
    assert set(operator.transformers()) == {"serving"}

    canary = short_dir / "canary.json"
    params = REQUEST | {"output": str(short_dir / "canary.mp4")}
    canary.write_text(json.dumps({"params": params, "reference": "first.mp4", "psnr": 60}))
    asked = ("reload", "--checkpoint", SECOND, "--component", "transformer", "--canary", canary)
    assert "dB of its reference, at least 60 dB were asked for; the old weights go on" in operator.refused(*asked)
    assert operator.transformers()["serving"][1] == first
    shutil.copy(short_dir / "canary.mp4", short_dir / "first.mp4")
    done = operator(*asked)
    assert done[0] == f"transformer: is now {second}" and done[1].startswith("12 MB read and verified in ")
    client.generate(**REQUEST, output=str(short_dir / "second.mp4"))
    rows = operator.transformers()
    assert rows["serving"] == ["transformer", second, "serving", "revision-2", "cpu", "12", "MB", "2", "0"]
    assert rows["previous"] == ["transformer", first, "previous", "demo", "-", "-", "1", "0"]

    assert operator(*asked[:5]) == [f"transformer: {second}, as before"]
    assert operator("rollback")[0] == f"transformer: is now {first}"
    served = client.status().weights
    for components in ((), ("--component", "all")):
        lines = operator("reload", "--checkpoint", FIRST, *components)
        assert sorted(lines) == sorted(f"{name}: {content[:12]}, as before" for name, content in served.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--checkpoint", SECOND), "to change only what is there: --component transformer"),
        (("--checkpoint", FIRST, "--component", "unet"), "wan-demo has no unet; its components are"),
        (("--checkpoint", FIRST, "--when", "later"), "--when is 'later'; it must be drain, now, pin"),
        (("--checkpoint", "nowhere"), "is not a directory"),
        (("--checkpoint", FIRST, "--stage", "dit"), "say what to reload"),
        (("--checkpoint", FIRST, "--manifest", "nowhere"), "the manifest nowhere cannot be read"),
        (("--stage", "unet"), "--stage is 'unet'; it must be text, dit, vae, writer"),
        ((), "say what to reload"),
    ],
)
def test_what_cannot_be_asked_for(
    operator: Operator, engine_process: EngineProcess, options: tuple[str | Path, ...], says: str
) -> None:
    """One sentence that says what to change, and nothing has changed: no weights, no process."""
    client = Client(engine_process.socket)
    before = client.versions(), [stage.pid for stage in client.status().stages]
    assert says in operator.refused("reload", *options)
    assert (client.versions(), [stage.pid for stage in client.status().stages]) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"params": REQUEST | {"seed": None}, "reference": "v.mp4"}, "has a reference and no seed"),
        ({"params": REQUEST | {"steps": 0}}, "steps is 0"),
        ({"params": REQUEST, "psrn": 30}, "unknown field"),
        ({"reference": "v.mp4"}, "missing required field"),
    ],
)
def test_canaries_that_are_none(operator: Operator, short_dir: Path, content: dict[str, Any], says: str) -> None:
    canary = short_dir / "canary.json"
    canary.write_text(json.dumps(content))
    before = operator.transformers()
    asked = ("reload", "--checkpoint", SECOND, "--component", "transformer", "--canary", canary)
    assert says in operator.refused(*asked)
    assert operator.transformers() == before


def test_all_is_every_component() -> None:
    assert read_components(["vae", "all"]) == read_components([]) == ()
    assert read_components(["vae", "transformer"]) == ("vae", "transformer")
