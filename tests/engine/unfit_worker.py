"""A stage process whose new code is not fit: it computes NaN in its rehearsal, or does not even start."""

from __future__ import annotations

import os

if os.environ.get("UNFIT") == "import":
    raise ImportError("a library that is not there")

import stages.dit
import stages.worker


def spoil() -> None:
    compute = stages.dit.predict
    stages.dit.predict = lambda *given: compute(*given) * float("nan")  # type: ignore[assignment]


if __name__ == "__main__":
    if os.environ.get("UNFIT") == "nan":
        spoil()
    stages.worker.main()
