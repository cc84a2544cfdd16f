"""`.pth` files: the same tables as of safetensors, from torch's archives, and a typed error for all else."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hotreload.pth import read_pth
from hotreload.tables import MAX_PICKLE, check_archive
from ipc.errors import BadCheckpoint

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(2.0, dtype=torch.float16),
    "d": torch.arange(100.0)[10:20],
    "e": nn.Parameter(torch.full((3,), 7.0, dtype=torch.float64)),
    "f": torch.tensor([1, 2]),
}


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def test_the_table_says_where_the_bytes_are(tmp_path: Path) -> None:
    """Dtypes, a scalar, a parameter, a view into a larger storage: the file has each tensor's bytes where it says."""
    path = save(tmp_path / "x.pth", TENSORS)
    raw, entries = path.read_bytes(), read_pth(path, "vae: x.pth")
    names = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F64": torch.float64,
        "I64": torch.int64,
    }
    assert [entry.name for entry in entries] == list(TENSORS)
    for entry in entries:
        found = torch.frombuffer(bytearray(raw[entry.offset : entry.offset + entry.size]), dtype=names[entry.dtype])
        assert torch.equal(found.view(entry.shape), TENSORS[entry.name].detach())


def test_reading_a_table_takes_no_memory(tmp_path: Path) -> None:
    """A tensor of 128 MiB: the process that reads the table grows by less than a quarter of that."""
    script = (
        "import resource, sys; from pathlib import Path; from hotreload.pth import read_pth\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_pth(Path(sys.argv[1]), 'x')\n"
        "before = rss()\n"
        "assert [e.size for e in read_pth(Path(sys.argv[2]), 'x')] == [128 << 20]\n"
        "assert rss() - before < 32 << 10, rss() - before\n"
    )
    small = save(tmp_path / "small.pth", {"a": torch.zeros(1, dtype=torch.uint8)})
    large = save(tmp_path / "large.pth", {"a": torch.zeros(128 << 20, dtype=torch.uint8)})
    subprocess.run([sys.executable, "-c", script, str(small), str(large)], check=True, timeout=60)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    """Cut at 200 places: the end of the archive is gone, and the supervisor sees it without torch."""
    whole = save(tmp_path / "x.pth", TENSORS).read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 200)):
        (tmp_path / "x.pth").write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match=r"^vae: x\.pth is cut short"):
            check_archive(tmp_path / "x.pth", "vae: x.pth")
        with pytest.raises(BadCheckpoint, match=r"^vae: x\.pth is cut short"):
            read_pth(tmp_path / "x.pth", "vae: x.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_flipped_byte_of_the_pickle_is_survived(tmp_path: Path) -> None:
    """Each byte of data.pkl and of the archive's directory inverted in turn: `BadCheckpoint` or a table."""
    path = save(tmp_path / "x.pth", {"a.weight": torch.ones(3), "b": torch.ones(2, 2)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickle = archive.getinfo("x/data.pkl")
    start = pickle.header_offset
    refused = 0
    for position in [*range(start, start + 64 + pickle.file_size), *range(len(whole) - 300, len(whole))]:
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            read_pth(path, "x")
        except BadCheckpoint:
            refused += 1
    assert refused > 100


class Evil:
    """Creates a file when it is unpickled by whoever runs what a pickle says."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """It names os.mkdir: refused, and nothing was created."""
    path = save(tmp_path / "x.pth", {"a": Evil(str(tmp_path / "made"))})
    with pytest.raises(BadCheckpoint, match=r"cannot be read as plain tensors: it names posix\.mkdir, which is code"):
        read_pth(path, "x")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.ones(2)], "holds a list, expected a dictionary"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict' is a dict; expected nothing but named tensors"),
        ({"step": 7, "a": torch.ones(2)}, "'step' is a int"),
        ({3: torch.ones(2)}, "has a key that is a int; expected nothing but named tensors"),
        ({"a": torch.ones(2, 3).t()}, "'a' is not contiguous"),
        ({"a": torch._neg_view(torch.ones(2))}, r"'a' is stored as the negative of its bytes; .*resolve_neg"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, r"'a' has the dtype torch\.complex64"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"'a' has the dtype torch\.complex64"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path: Path, content: object, problem: str) -> None:
    """A list, nested dictionaries, numbers, transposed, negated, complex or conjugate tensors."""
    with pytest.raises(BadCheckpoint, match=problem):
        read_pth(save(tmp_path / "x.pth", content), "vae: x.pth")


@pytest.mark.parametrize(
    ("name", "content", "compression", "problem"),
    [
        ("data.pkl", bytes(1 << 20), zipfile.ZIP_DEFLATED, r"is compressed \(x/data\.pkl\)"),
        ("byteorder", bytes(1 << 20), zipfile.ZIP_DEFLATED, r"is compressed \(x/byteorder\)"),
        ("data.pkl", bytes(MAX_PICKLE + 1), zipfile.ZIP_STORED, r"x/data\.pkl has 67108865 bytes, expected at most"),
    ],
)
def test_what_torch_reads_whole_is_limited(
    tmp_path: Path, name: str, content: bytes, compression: int, problem: str
) -> None:
    """A pickle, or another record, that unpacks to a thousand times its size; one of more than 64 MiB."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(save(tmp_path / "plain.pth", TENSORS)) as plain, zipfile.ZipFile(path, "w") as bomb:
        for member in plain.namelist():
            if not member.endswith(f"/{name}"):
                bomb.writestr(member.replace("plain/", "x/"), plain.read(member))
        bomb.writestr(f"x/{name}", content, compression)
    for read in (check_archive, read_pth):
        with pytest.raises(BadCheckpoint, match=rf"^vae: x\.pth.*{problem}"):
            read(path, "vae: x.pth")


def with_directory(path: Path, offset: int, size: int, *, located: int | None = None, comment: bytes = b"") -> Path:
    """A sparse file whose end says that its directory is there, and the ZIP64 record behind it or at `located`."""
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, offset + size if located is None else located, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, len(comment))
    with path.open("wb") as file:
        file.seek(offset + size)
        file.write(end64 + locator + end + comment)
    return path


@pytest.mark.parametrize(
    ("directory", "problem"),
    [
        ({"offset": 0, "size": 64 << 30}, "its directory has 68719476736 bytes, expected at most 4194304"),
        ({"offset": 64 << 30, "size": 1 << 20, "located": 4096}, "its ZIP64 record is not where it says, at 4096"),
        ({"offset": 0, "size": 1 << 20, "comment": b"64 GiB"}, "it does not end with the record that ends"),
    ],
    ids=["huge", "elsewhere", "commented"],
)
def test_a_directory_is_measured_before_it_is_read(tmp_path: Path, directory: dict[str, Any], problem: str) -> None:
    """A sparse file that says it has a directory of 64 GiB, or that torch and zipfile would look for it in different
    places: refused by a process that cannot have more than 1 GiB beyond what it has."""
    path = with_directory(tmp_path / "x.pth", **directory)
    assert path.stat().st_blocks <= 16
    script = (
        "import resource, sys; from pathlib import Path; from hotreload.tables import check_archive\n"
        "from ipc.errors import BadCheckpoint\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "try: check_archive(Path(sys.argv[1]), 'x')\n"
        "except BadCheckpoint as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert problem in ran.stdout, ran.stderr
    with pytest.raises(BadCheckpoint, match=problem):
        read_pth(path, "x")


def test_a_directory_that_is_not_where_it_says_is_refused(tmp_path: Path) -> None:
    """Something before the archive: zipfile reckons with that, torch does not."""
    path = save(tmp_path / "x.pth", TENSORS)
    path.write_bytes(bytes(4096) + path.read_bytes())
    with pytest.raises(BadCheckpoint, match="its ZIP64 record is not where it says"):
        read_pth(path, "x")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"")
    path.write_bytes(bytes(4096) + path.read_bytes())
    assert zipfile.ZipFile(path).namelist() == ["x/data.pkl"]
    with pytest.raises(BadCheckpoint, match=r"its directory is not where it says: \d+ bytes at \d+ of \d+"):
        read_pth(path, "x")


@pytest.mark.parametrize(
    ("depth", "problem"), [(10_000, "has a key that is a tuple; expected nothing"), (10**6, "more than 20000 tuples")]
)
def test_a_key_of_nested_tuples_is_refused(tmp_path: Path, depth: int, problem: str) -> None:
    """The text of ten thousand cannot be made within the stack, so its type is named; the hash of a million ended the
    process."""
    pickle = b"\x80\x02})" + b"\x85" * depth + b"K\x01s."
    with (
        zipfile.ZipFile(save(tmp_path / "plain.pth", TENSORS)) as plain,
        zipfile.ZipFile(tmp_path / "deep.pth", "w") as deep,
    ):
        for name in plain.namelist():
            deep.writestr(name, pickle if name.endswith("data.pkl") else plain.read(name))
    with pytest.raises(BadCheckpoint, match=problem):
        read_pth(tmp_path / "deep.pth", "x")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    """PyTorch's old format, a zip archive of something else, a compressed archive, one that another
    program wrote without torch's alignment, a file that is not there."""
    save(tmp_path / "legacy.pth", TENSORS, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("x/readme", "hello")
    with (
        zipfile.ZipFile(save(tmp_path / "x.pth", TENSORS)) as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        zipfile.ZipFile(tmp_path / "unaligned.pth", "w") as unaligned,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
            unaligned.writestr(name, plain.read(name))
    problems = {
        "legacy": "or of PyTorch before 1.6",
        "zip": "not one that torch.save wrote",
        "packed": "is compressed",
        "unaligned": "are not where torch.save puts them",
        "gone": "cannot be read: No such file",
    }
    for name, problem in problems.items():
        with pytest.raises(BadCheckpoint, match=problem):
            read_pth(tmp_path / f"{name}.pth", "x")
