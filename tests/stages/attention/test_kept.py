"""The next engine takes the attention that the last one did, and only what is right; the directory is ours alone."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from stages import cache
from stages.attention import backends, choice, kept
from stages.attention.backends import IMPLEMENTATIONS, Case, Implementation

CPU = Case(torch.device("cpu"), torch.float32, 16)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "engine"


def edited(home: Path, backend: str) -> None:
    """Have the file say that another one was taken, for all that it knows of."""
    path = home / kept.NAME
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), backend)))


def test_the_first_engine_measures_and_the_next_takes_the_same(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it would measure itself; for other heads, and with another version of a library, it measures again."""
    surveys = []

    def counted(case: Case, heads: int, with_lse: bool) -> object:
        surveys.append(heads)
        return survey(case, heads, with_lse)

    survey = choice.survey
    monkeypatch.setattr(choice, "survey", counted)
    assert choice.automatic(CPU, 2) == "sdpa" and surveys == [2]
    edited(home, "math")
    assert choice.automatic(CPU, 2) == "math" and surveys == [2]
    assert choice.automatic(CPU, 3) == "sdpa" and surveys == [2, 3]
    assert choice.automatic(CPU, 2) == "math", "both are known"
    newer = {**IMPLEMENTATIONS, "math": IMPLEMENTATIONS["math"]._replace(version=lambda: "another")}
    monkeypatch.setattr(kept, "IMPLEMENTATIONS", newer)
    assert choice.automatic(CPU, 2) == "sdpa" and surveys == [2, 3, 2]


def test_what_was_taken_and_is_wrong_now_is_not_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = choice.survey(CPU, 2, with_lse=False)
    assert choice.automatic(CPU, 2) == "sdpa"
    edited(home, "math")
    wrong = {**IMPLEMENTATIONS, "math": Implementation(
        lambda q, k, v, lse: (q * 1.01, None), lambda case: "", IMPLEMENTATIONS["math"].version
    )}  # fmt: skip
    for module in (backends, choice, kept):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", wrong)
    surveys: list[int] = []
    monkeypatch.setattr(choice, "survey", lambda case, heads, with_lse: surveys.append(heads) or measured)
    assert choice.automatic(CPU, 2) == "sdpa" and surveys == [2]
    assert kept.recall(CPU, 2) == "sdpa"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b'{"a": "no such backend"}', b'{"a": 3}', b"\x00", b"{" * 5000, b'{"\xff": "math"}',
        b'{"a": "\xff"}', b"{" + b" " * kept.MAX_BYTES + b"}",
    ],
    ids=lambda text: repr(text[:16]),
)  # fmt: skip
def test_a_file_that_this_has_not_written(home: Path, text: bytes) -> None:
    """It is measured again, and the file is whole afterwards."""
    home.mkdir()
    (home / kept.NAME).write_bytes(text)
    assert kept.recall(CPU, 2) is None
    assert choice.automatic(CPU, 2) == "sdpa"
    assert kept.recall(CPU, 2) == "sdpa"
    assert sorted(path.name for path in home.iterdir()) == [kept.NAME]


def test_a_fifo_in_the_place_of_the_file(home: Path) -> None:
    """Nobody writes to it: a dit that read it would wait for good. The file is in its place afterwards."""
    home.mkdir()
    os.mkfifo(home / kept.NAME)
    reading = threading.Thread(target=kept.recall, args=(CPU, 2), daemon=True)
    reading.start()
    reading.join(20)
    assert not reading.is_alive()
    assert choice.automatic(CPU, 2) == "sdpa"
    assert (home / kept.NAME).is_file() and kept.recall(CPU, 2) == "sdpa"


def test_a_link_to_what_has_no_end(home: Path) -> None:
    """Nothing of it is read, and what it leads to stays as it is; so does a file elsewhere."""
    home.mkdir()
    elsewhere = home.parent / "elsewhere"
    elsewhere.write_text("something else")
    for target in (Path("/dev/zero"), elsewhere):
        (home / kept.NAME).symlink_to(target)
        assert kept.recall(CPU, 2) is None
        kept.remember(CPU, 2, "math")
        assert not (home / kept.NAME).is_symlink() and kept.recall(CPU, 2) == "math"
        (home / kept.NAME).unlink()
    assert elsewhere.read_text() == "something else"


def test_a_disk_that_takes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made, none is kept, and nothing half-written is left."""

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert choice.automatic(CPU, 2) == "sdpa"
    assert list(home.iterdir()) == []


def test_a_directory_that_others_can_write_to_is_not_used(home: Path) -> None:
    """What is in it is code. Nor one that is a file, or that cannot be made."""
    assert cache.directory() == home
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o770)
    assert cache.directory() is None
    home.chmod(0o707)
    assert cache.directory() is None
    assert choice.automatic(CPU, 2) == "sdpa"
    home.rmdir()
    home.write_text("a file")
    assert cache.directory() is None
    assert choice.automatic(CPU, 2) == "sdpa"


def test_a_relative_directory_counts_as_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an engine would keep code in whatever directory it is started in."""
    monkeypatch.chdir(home.parent)
    monkeypatch.setenv("HOME", str(home.parent / "user"))
    for base in ("cache", "", None):
        if base is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache.directory() == home.parent / "user" / ".cache" / "engine"
    assert not (home.parent / "cache").exists()
