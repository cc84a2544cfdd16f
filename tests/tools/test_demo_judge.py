"""The pixel judge, on drawn clips where the truth is known."""

import pytest
import torch

from tools.demo_judge import judge, matches, score
from tools.demo_scenes import BACKGROUND_RGB, COLOURS, FRAMES, SIZE, STYLES, Scenes, render, sample_scenes
from tools.demo_vae_training import to_uint8

CLIPS = 24


def drawn(style: int, seed: int, two_shapes: float) -> tuple[Scenes, torch.Tensor]:
    """Held-out scenes and their clips, uint8."""
    scenes = sample_scenes(CLIPS, torch.Generator().manual_seed(seed), held_out=True, two_shapes=two_shapes)
    return scenes, to_uint8(render(scenes, style=style))


@pytest.mark.parametrize("style", range(len(STYLES)), ids=STYLES)
@pytest.mark.parametrize("two_shapes", [0.0, 1.0], ids=["one", "two"])
def test_judge_reads_drawn_clips(style: int, two_shapes: float) -> None:
    """On drawn clips the judge gets every attribute of at least 23 in 24 clips right, and tells the styles apart."""
    scenes, clips = drawn(style, seed=11, two_shapes=two_shapes)
    figures = score(judge(clips), scenes)
    ink = figures.pop("ink")
    assert min(figures.values()) >= (CLIPS - 1) / CLIPS, figures
    assert ink < 0.05 if style == 0 else ink > 0.6


def test_judge_survives_small_errors() -> None:
    """Noise of a deviation of 8 levels, about 30 dB, changes no verdict on colour, direction or background."""
    scenes, clips = drawn(0, seed=12, two_shapes=0.3)
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0)) * 8
    figures = score(judge((clips.float() + noise).clamp(0, 255).to(torch.uint8)), scenes)
    assert figures["colour"] == figures["direction"] == figures["background"] == 1.0
    assert figures["shape"] >= 0.9


def test_shuffled_prompts_fall_to_chance() -> None:
    """Judged against another scene, colour is right about once in eight, not most of the time."""
    scenes, clips = drawn(0, seed=13, two_shapes=0.0)
    other = Scenes(**{name: value.roll(1, 0) for name, value in scenes.tensors().items()})
    figures = score(judge(clips), other)
    assert figures["colour"] < 4 / len(COLOURS)
    assert figures["direction"] < 0.45
    assert figures["shape"] < 0.5


def test_empty_and_noisy_clips_match_nothing() -> None:
    """A clip without shapes has its background recognised and never counts as a scene with two shapes."""
    colour = torch.tensor(BACKGROUND_RGB[3], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    empty = colour.expand(1, 3, FRAMES, SIZE, SIZE).contiguous()
    verdict = judge(empty)
    assert int(verdict.background) == 3 and int(verdict.count) == 1
    scenes = sample_scenes(1, torch.Generator().manual_seed(3), two_shapes=1.0)
    assert not any(
        bool(right) for name, right in matches(verdict, scenes).items() if name in ("colour", "shape", "count")
    )
