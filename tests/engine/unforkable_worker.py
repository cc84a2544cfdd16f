"""`stages.worker` from which nothing can be forked: it ends when it is told to be such a process."""

from __future__ import annotations

from typing import Any

import stages.worker


def ends(*arguments: Any) -> Any:
    raise SystemExit(7)


stages.worker.serve_forks = ends

if __name__ == "__main__":
    stages.worker.main()
