"""The directory of what outlives an engine on this machine and can be made again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def directory() -> Path | None:
    """`$XDG_CACHE_HOME/engine`, else `~/.cache/engine`, made if need be; a relative path counts as none, as the XDG
    specification wants it. None if it cannot be written to, or if others can, too: what is in it is code."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        path = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "engine"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log.info("nothing is kept between engines: %s", error)
        return None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not os.access(path, os.W_OK | os.X_OK):
        log.warning("nothing is kept between engines: %s is not this user's alone to write to", path)
        return None
    return path
