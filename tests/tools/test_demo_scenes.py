"""Procedural scenes: the held-out split, placement, drawing, captions and their tokens."""

from random import Random

import pytest
import torch

from tools.demo_captions import BRIEF, DETAILED, Wording, captions
from tools.demo_scenes import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    COLOURS,
    DIRECTIONS,
    EXTENTS,
    FRAMES,
    SHAPES,
    SIZE,
    combinations,
    crop_origins,
    is_held_out,
    render,
    sample_scenes,
    shape_distance,
)
from tools.demo_tokenizer import END_ID, PAD_ID, make_tokenizer, token_rows


def generator(seed: int = 0) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)


def test_split_is_disjoint_and_covers_every_attribute() -> None:
    """Every combination is in exactly one split, and each shape, colour and direction occurs in both."""
    held_out, trained = combinations(True), combinations(False)
    assert len(held_out) + len(trained) == len(SHAPES) * len(COLOURS) * len(DIRECTIONS)
    assert not {tuple(row) for row in held_out.tolist()} & {tuple(row) for row in trained.tolist()}
    for split in (held_out, trained):
        for column, names in enumerate((SHAPES, COLOURS, DIRECTIONS)):
            assert len(split[:, column].unique()) == len(names)


def test_demo_prompt_is_a_trained_combination() -> None:
    """A red circle that moves left is not held out."""
    assert not is_held_out(SHAPES.index("circle"), COLOURS.index("red"), DIRECTIONS.index("left"))


@pytest.mark.parametrize("held_out", [False, True])
def test_sampled_scenes_respect_the_split(held_out: bool) -> None:
    """A thousand scenes draw all their shapes, second ones included, from the split that was asked for."""
    scenes = sample_scenes(1000, generator(), held_out=held_out)
    assert bool((is_held_out(scenes.shape, scenes.colour, scenes.direction) == held_out).all())
    assert bool((scenes.colour[:, 0] != scenes.colour[:, 1]).all())
    assert 300 < int((scenes.count == 2).sum()) < 500


def test_shapes_stay_inside_and_apart() -> None:
    """Over the whole clip every shape is inside the canvas, and two shapes hardly ever touch."""
    scenes = sample_scenes(500, generator(1))
    time = torch.arange(FRAMES).view(1, FRAMES, 1, 1)
    centre = scenes.start[:, None] + scenes.velocity[:, None] * time
    extent = scenes.extent[:, None, :, None]
    shown = (torch.arange(2) < scenes.count[:, None])[:, None, :, None]
    assert bool(((centre - extent >= 0) | ~shown).all())
    assert bool(((centre + extent <= SIZE) | ~shown).all())
    gap = (centre[:, :, 0] - centre[:, :, 1]).norm(dim=-1).amin(dim=1) - scenes.extent.sum(dim=1)
    assert float((gap[scenes.count == 2] > 0).float().mean()) > 0.97


def test_same_seed_same_scenes() -> None:
    """Two generators with one seed draw identical clips."""
    first, second = (render(sample_scenes(3, generator(7)), frames=2) for _ in range(2))
    assert torch.equal(first, second)


def test_render_paints_palette_colours() -> None:
    """The pixel at a shape's centre has its colour, a corner has the background's."""
    scenes = sample_scenes(20, generator(2), two_shapes=0.0)
    frames = ((render(scenes, frames=1) + 1) * 127.5).round()
    for row in range(len(scenes)):
        x, y = scenes.start[row, 0].long().tolist()
        assert frames[row, :, 0, y, x].tolist() == list(COLOUR_RGB[int(scenes.colour[row, 0])])
        assert frames[row, :, 0, 0, 0].tolist() == list(BACKGROUND_RGB[int(scenes.background[row])])


def test_extents_enclose_shapes() -> None:
    """No shape reaches beyond the circle that placement reserves for it."""
    axis = torch.arange(128) + 0.5 - 64
    count = len(SHAPES)
    x = axis.view(1, 1, 1, -1).expand(count, 1, 1, -1)
    y = axis.view(1, 1, -1, 1).expand(count, 1, -1, 1)
    inside = shape_distance(torch.arange(count), torch.full((count,), 40.0), x, y)[:, 0] < 0
    reach = (torch.hypot(x, y)[:, 0] * inside).amax(dim=(1, 2))
    assert bool((inside.sum(dim=(1, 2)) > 1000).all())
    # Corners may stick out by the pixel that blends them away; a cross has its corners at 1.16.
    assert bool((reach <= 40 * torch.tensor(EXTENTS) + 1).all())


def test_crop_equals_part_of_the_clip() -> None:
    """Drawing a square at its origin gives the same pixels as cutting it out of the whole clip."""
    scenes = sample_scenes(4, generator(3))
    origins = crop_origins(scenes, 48, generator(4))
    whole = render(scenes, style=1, frames=3)
    parts = render(scenes, style=1, frames=3, size=48, origin=origins)
    for row, (x, y) in enumerate(origins.long().tolist()):
        torch.testing.assert_close(parts[row], whole[row, :, :, y : y + 48, x : x + 48], atol=1e-3, rtol=0)


def test_detailed_captions_name_more_than_brief_ones() -> None:
    """Captions are reproducible, vary in wording, and name size and speed only when asked to."""
    scenes = sample_scenes(200, generator(5), two_shapes=0.0)
    detailed, brief = captions(scenes, Random(0), DETAILED), captions(scenes, Random(0), BRIEF)
    assert detailed == captions(scenes, Random(0), DETAILED)
    assert len(set(detailed)) > 190
    assert sum(map(len, detailed)) > sum(map(len, brief))
    assert not any("slow" in line or "huge" in line or "tiny" in line for line in brief)


def test_tokens_of_captions_and_of_arbitrary_text() -> None:
    """Captions use whole words, fit the training length and end with </s>; other text becomes pieces, never unknown."""
    tokenizer = make_tokenizer(captions_seen=2000)
    rows = token_rows(tokenizer, captions(sample_scenes(300, generator(6)), Random(1), Wording()), 48)
    assert int((rows != PAD_ID).sum(dim=1).max()) <= 48
    assert bool(((rows == END_ID).sum(dim=1) == 1).all())
    assert tokenizer.encode("").ids == [END_ID]
    prompt = tokenizer.encode("A red circle moves left on a black background")
    assert len(prompt.ids) == 10 and tokenizer.decode(prompt.ids) == "a red circle moves left on a black background"
    odd = tokenizer.encode("héllo 红色 \U0001f3ac")
    assert 2 not in odd.ids and tokenizer.decode(odd.ids) == "héllo 红色 \U0001f3ac"
