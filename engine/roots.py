"""The paths a request names: absolute, free of symbolic links, below the directory the operator allows."""

from __future__ import annotations

import os

from engine.params import SystemParams
from ipc.errors import BadRequest

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
    root = os.path.realpath(system.output_root)
    if os.path.commonpath((root, resolved)) != root:
        raise BadRequest(f"the {name} path {path!r} is outside the directory this server works in")
    return resolved


def utf8(name: str, text: str) -> bytes:
    """The bytes of a text; a lone surrogate is a `BadRequest`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"the {name} contains characters that are not valid Unicode; remove them") from error
