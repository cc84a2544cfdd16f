"""Fixtures: a tiny checkpoint on disk, and shared memory for its stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.stages.rig import Rig, make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def rig(checkpoint: Path) -> Iterator[Rig]:
    torch.set_num_threads(1)
    with Rig(checkpoint) as rig:
        yield rig
