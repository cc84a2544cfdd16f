"""How `wan-demo` is trained: batch sizes, steps and rates of every phase. A recipe and a seed reproduce the model."""

from __future__ import annotations

import dataclasses

from tools.demo_networks import DEMO, TINY, Architecture
from tools.demo_scenes import FRAMES, SIZE
from tools.demo_training import Schedule


@dataclasses.dataclass(frozen=True)
class VaePhase:
    """One phase of the VAE's training, on squares of `size` pixels and `frames` frames."""

    batch: int
    frames: int
    size: int
    clips: int
    schedule: Schedule
    compiled: bool = True


@dataclasses.dataclass(frozen=True)
class TransformerPhase:
    """Training of transformer and text encoder, or (with `style` 1) of the transformer alone."""

    batch: int
    clips: int
    schedule: Schedule
    style: int = 0
    captions_per_clip: int = 6
    caption_dropout: float = 0.1
    flow_shift: float = 3.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything but the seed."""

    architecture: Architecture
    vae: tuple[VaePhase, ...]
    transformer: TransformerPhase
    style: TransformerPhase
    statistics_clips: int
    validation_clips: int
    text_tokens: int = 48
    """Captions are padded to so many tokens in training; all of them fit."""


# Steps are those of the weights in configs/demo; seconds are three times what an H200 took.
FULL = Recipe(
    architecture=DEMO,
    vae=(
        # Single frames first: 2D features for a tenth of the cost.
        VaePhase(256, 1, 48, 65_536, Schedule(1_280, 120, rate=1.5e-3, final=0.5), compiled=False),
        # Squares around the shapes: four times the foreground of whole clips for the same time.
        VaePhase(64, FRAMES, 48, 65_536, Schedule(7_400, 750, rate=1.5e-3, final=0.1)),
        VaePhase(32, FRAMES, SIZE, 16_384, Schedule(1_870, 450, rate=4e-4)),
    ),
    transformer=TransformerPhase(384, 98_304, Schedule(21_600, 1_260, rate=1e-3, warmup=500)),
    style=TransformerPhase(384, 32_768, Schedule(4_250, 300, rate=4e-4), style=1),
    statistics_clips=4_096,
    validation_clips=256,
)
DRY = Recipe(
    architecture=TINY,
    vae=(
        VaePhase(2, 1, 48, 8, Schedule(2, 30, rate=1e-3, warmup=1), compiled=False),
        VaePhase(1, FRAMES, 48, 4, Schedule(2, 30, rate=1e-3, warmup=1), compiled=False),
    ),
    transformer=TransformerPhase(2, 6, Schedule(3, 30, rate=1e-3, warmup=1)),
    style=TransformerPhase(2, 4, Schedule(2, 30, rate=1e-3, warmup=1), style=1),
    statistics_clips=4,
    validation_clips=2,
)
"""Every path in seconds on a CPU, with tiny networks that learn nothing."""
RECIPES = {"full": FULL, "dry": DRY}
