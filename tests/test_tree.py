"""What no file of this repository may contain: ways to run what was only to be read, and shared memory with a name."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "multiprocessing"}
)
"""They run code that is hidden in data, the last one in what its queues, pipes and pools carry."""
CALLS = {
    "eval": "runs text", "exec": "runs text", "os.system": "runs a shell", "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell", "subprocess.getstatusoutput": "runs a shell",
    "yaml.load": "builds objects: yaml.safe_load", "yaml.unsafe_load": "builds objects: yaml.safe_load",
    "yaml.full_load": "builds objects: yaml.safe_load", "tempfile.mktemp": "a name is not a file: mkstemp",
    "torch.hub.load": "runs what it downloads", "pandas.read_pickle": "unpickles", "torch.jit.load": "runs code",
    "concurrent.futures.ProcessPoolExecutor": "pickles", "torch.distributed.broadcast_object_list": "unpickles",
    "multiprocessing.shared_memory.SharedMemory": "memory with a name outlives everybody: ipc.memory",
    "shared_memory.SharedMemory": "memory with a name outlives everybody: ipc.memory",
    "SharedMemory": "memory with a name outlives everybody: ipc.memory",
}  # fmt: skip
NAMED_MEMORY = "/dev/" + "shm"
FOLDERS = ("engine", "hotreload", "ipc", "stages", "tests", "tools")


def files() -> list[Path]:
    """Every Python file that git knows or would take up; without git, every one in our folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if path.exists())


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def meanings(tree: ast.Module) -> dict[str, str]:
    """What each name that is imported under another one, or from a module, stands for: load -> torch.load."""
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {name.asname: name.name for name in names if name.asname}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {name.asname or name.name: f"{module}.{name.name}" for name in names}
    return found


def problems(source: str) -> Iterator[str]:
    """What is wrong with a file, with the line."""
    tree = ast.parse(source)
    meant = meanings(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    if name.name.removeprefix("torch.").split(".")[0] in MODULES:
                        yield f"{node.lineno}: imports {name.name}"
            case ast.ImportFrom(module=str(module)) if module.removeprefix("torch.").split(".")[0] in MODULES:
                yield f"{node.lineno}: imports from {module}"
            case ast.Call():
                yield from _problems_of_call(node, meant)
            case ast.Constant(value=str(text)) if text.startswith(NAMED_MEMORY):
                yield f"{node.lineno}: names shared memory"


def _problems_of_call(call: ast.Call, meant: dict[str, str]) -> Iterator[str]:
    first, dot, rest = dotted(call.func).partition(".")
    name = meant.get(first, first) + dot + rest
    options = {option.arg: option.value for option in call.keywords if option.arg is not None}
    if name in CALLS:
        yield f"{call.lineno}: {name} {CALLS[name]}"
    if "shell" in options and not (isinstance(options["shell"], ast.Constant) and options["shell"].value is False):
        yield f"{call.lineno}: {name} with a shell"
    if name.endswith("torch.load") and not ("weights_only" in options and is_true(options["weights_only"])):
        yield f"{call.lineno}: torch.load without weights_only=True unpickles"
    if "allow_pickle" in options and is_true(options["allow_pickle"]):
        yield f"{call.lineno}: {name} unpickles"
    if name.split(".")[-1] == "__import__":
        yield f"{call.lineno}: imports what a text says"


def test_no_file_runs_what_it_reads() -> None:
    """No pickle and its kin, no torch.load but with weights_only=True, no eval, exec, shell, yaml.load or mktemp, no
    shared memory with a name, in any file; but for two benchmarks, of which one has `dd` write a file in memory and one
    is against the queues of torch.multiprocessing."""
    found = files()
    excused = {("tools/bench_load.py", "names shared memory"), ("tools/bench_handoff.py", "multiprocessing")}
    assert len(found) > 100
    wrong = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in found
        for problem in problems(path.read_text())
        if not any(str(path.relative_to(ROOT)) == file and what in problem for file, what in excused)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import shelve", "import cloudpickle",
        "from marshal import loads", "def f():\n    import dill", "eval(text)", "exec('1')", "torch.load(path)",
        "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "np.load(p, allow_pickle=True)",
        "subprocess.run('ls', shell=True)", "subprocess.Popen(c, shell=flag)", "os.system('ls')", "os.popen('ls')",
        "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "tempfile.mktemp()", "__import__(name)",
        "from torch import load\nload(path)", "import torch as t\nt.load(path)", "torch.jit.load(path)",
        "from torch import load as read\nread(path, weights_only=False)", "from os import system\nsystem('ls')",
        "import multiprocessing as mp", "import torch.multiprocessing", "from multiprocessing import Queue",
        "from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor()",
        f"open('{NAMED_MEMORY}/x')", "shared_memory.SharedMemory(name='x')",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    """The control: each of these would be reported."""
    assert list(problems(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()", "torch.load(path, weights_only=True)", "subprocess.run(['ls'], shell=False)",
        "yaml.safe_load(text)", "import pickletools", "cursor.execute('x')", "np.load(path, allow_pickle=False)",
        "from torch import load\nload(path, weights_only=True)", "from yaml import safe_load\nsafe_load(text)",
    ],
)  # fmt: skip
def test_the_search_leaves_the_harmless_alone(source: str) -> None:
    """The control of the control."""
    assert not list(problems(source))
