"""How a command begins: what it imports, and Ctrl-C meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from tests.engine.wire import environment, run_engine


@pytest.mark.parametrize("module", ["msgspec", "typer.core", "pydantic_core", "asyncio.events"])
def test_ctrl_c_while_modules_are_imported(tmp_path: Path, module: str) -> None:
    """SIGINT when Python says that it has imported this module: exit code 130, and nothing else is said."""
    command = [sys.executable, "-X", "importtime", "-m", "engine", "status", "--socket", str(tmp_path / "none")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        imported = next(line for line in process.stderr if line.rpartition("|")[2].strip() == module)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().splitlines()
    assert imported.startswith("import time:")
    assert process.returncode == 130, rest
    assert [line for line in rest if not line.startswith("import time:")] == []


def test_ctrl_c_is_ignored_where_it_was() -> None:
    """As after `nohup` or in a script's background: the command runs to its end."""
    code = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import engine.command as c, sys; "
    code += "sys.argv = ['engine', 'version']; os.kill(os.getpid(), signal.SIGINT); c.main()"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert ran.stdout.startswith("engine "), ran.stderr


def test_every_public_name_is_there() -> None:
    """Each is imported when it is asked for; a name that is none is said to be none."""
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="'engine' has no attribute 'Sopervisor'"):
        engine.Sopervisor  # type: ignore[attr-defined]  # noqa: B018


def test_a_short_command_does_not_wait_for_the_supervisor() -> None:
    code = "import sys; from engine.cli import app; import engine.client; print('engine.supervisor' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
    assert run_engine("version").returncode == 0
