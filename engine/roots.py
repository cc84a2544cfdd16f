"""The paths a request names: absolute, free of symbolic links, below the directory the operator allows; and those of
weights, whose links may lead about in theirs."""

from __future__ import annotations

import os

from engine.params import SystemParams
from hotreload.shown import shown
from ipc.errors import BadConfig, BadRequest

MAX_PATH_BYTES = 4096


def absolute(name: str, path: str) -> str:
    """`path` below the working directory, `~` expanded. `name` says in errors what it is the path of."""
    if "\0" in path:
        raise BadRequest(f"the {name} path contains a NUL character")
    if len(utf8(f"{name} path", path)) > MAX_PATH_BYTES:
        raise BadRequest(f"the {name} path is longer than {MAX_PATH_BYTES:,} bytes; use a shorter one")
    return os.path.join(os.getcwd(), os.path.expanduser(path))


def below_root(name: str, path: str, system: SystemParams) -> str:
    """`path` with symbolic links resolved; `BadRequest` if that leaves the operator's root."""
    resolved = os.path.realpath(absolute(name, path))
    if not _is_below(system.output_root, resolved):
        raise BadRequest(f"the {name} path {path!r} is outside the directory this server works in")
    return resolved


def check_weights_root(name: str, path: str | os.PathLike[str], root: str) -> None:
    """`BadConfig` for a file or directory of weights that is not below the operator's `checkpoint_root`, links
    resolved, or cannot be a path."""
    try:
        below = _is_below(root, os.path.realpath(path))
    except ValueError as error:  # a NUL character
        raise BadConfig(f"the {name} '{shown(path)}' is no path: {error}") from error
    if not below:
        raise BadConfig(
            f"the {name} '{shown(os.path.basename(path))}' is outside the directory that weights are read from; put it "
            "there, or start the engine with another --checkpoint-root"
        )


def _is_below(root: str, resolved: str) -> bool:
    root = os.path.realpath(root)
    return os.path.commonpath((root, resolved)) == root


def utf8(name: str, text: str) -> bytes:
    """The bytes of a text; a lone surrogate is a `BadRequest`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"the {name} contains characters that are not valid Unicode; remove them") from error
