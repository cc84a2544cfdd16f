"""Reads a scene back from pixels alone: how many shapes, their colours, forms and motions, and the background.

Background: the border's median colour. Colours: the most frequent palette colours after eroding edges away. Motion: a
straight line fitted to each shape's centroid. Form: overlap with templates of the same area at the same centroid.
Works on both styles: an outline counts as neither shape nor background.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_scenes import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    COLOURS,
    INK_RGB,
    PIXELS_PER_FRAME,
    RADII,
    SHAPES,
    STILL,
    UNIT_VECTORS,
    Scenes,
    shape_distance,
)

MIN_AREA = 40.0
"""Eroded pixels per frame that make a shape; the smallest real one has about 75."""
STILL_PIXELS = 5.0
"""A centroid that travels less over the clip stands still; the slowest moving one travels 11."""
FRAME_STRIDE = 2
TEMPLATE_FRAMES = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What B clips show. Slot 0 is the shape with more pixels; slot 1 is meaningless where `count` is 1.

    count [B]: shapes that were read, plus one where enough coloured pixels belong to neither. background [B]; shape,
    colour, direction, size, speed [B, 2] int64; ink [B] share of the pixels around the shapes that have the outline's
    colour.
    """

    count: Tensor
    background: Tensor
    shape: Tensor
    colour: Tensor
    direction: Tensor
    size: Tensor
    speed: Tensor
    ink: Tensor


@torch.no_grad()
def judge(frames: Tensor, chunk: int = 32) -> Verdict:
    """Judge uint8 clips [B, 3, T, H, W]."""
    parts = [_judge(part) for part in frames.split(chunk)]
    return Verdict(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Verdict)})


def matches(verdict: Verdict, scenes: Scenes) -> dict[str, Tensor]:
    """Which attributes of each clip are right: name -> bool [B].

    Shapes are matched by colour where there are two. An attribute of a scene with two shapes is right if it is right
    for both. `size` and `speed` are only meaningful where the prompt named them.
    """
    order = torch.stack((torch.arange(2), torch.arange(2).flip(0))).to(scenes.count.device)
    swap = (scenes.count == 2) & (verdict.colour[:, 0] != scenes.colour[:, 0])
    found = order[swap.long()]
    needed = torch.arange(2, device=scenes.count.device) < scenes.count[:, None]
    both_there = verdict.count >= scenes.count

    def right(name: str) -> Tensor:
        same = getattr(verdict, name).gather(1, found) == getattr(scenes, name)
        return (same | ~needed).all(dim=1) & both_there

    results = {name: right(name) for name in ("colour", "direction", "shape", "size")}
    moving = scenes.direction != STILL
    speed = verdict.speed.gather(1, found) == scenes.speed
    results["speed"] = (speed | ~needed | ~moving).all(dim=1) & both_there
    results["background"] = verdict.background == scenes.background
    results["count"] = verdict.count == scenes.count
    return results


def score(verdict: Verdict, scenes: Scenes) -> dict[str, float]:
    """Share of clips with each attribute right, and the mean share of outline-coloured pixels around shapes."""
    return {name: float(right.float().mean()) for name, right in matches(verdict, scenes).items()} | {
        "ink": float(verdict.ink.mean())
    }


def _judge(frames: Tensor) -> Verdict:
    device = frames.device
    pixels = frames[:, :, ::FRAME_STRIDE].float().movedim(1, -1)  # [B, T, H, W, 3]
    background = _background(pixels)
    base = torch.tensor(BACKGROUND_RGB, device=device, dtype=torch.float32)[background]
    ink = torch.tensor(INK_RGB, device=device, dtype=torch.float32)[background]
    palette = torch.tensor(COLOUR_RGB, device=device, dtype=torch.float32)
    distances = [_distance(pixels, base), _distance(pixels, ink)]
    distances += [_distance(pixels, colour.expand(len(frames), 3)) for colour in palette]
    label = torch.stack(distances).argmin(dim=0) - 2  # [B, T, H, W]: -2 background, -1 ink, else a colour
    cores = torch.stack([_erode(label == colour) for colour in range(len(COLOURS))], dim=1)  # [B, 8, T, H, W]
    areas = cores.flatten(2).sum(dim=2) / label.shape[1]
    top = areas.topk(2, dim=1)
    rows = torch.arange(len(frames), device=device)[:, None]
    cells = _cells(cores[rows, top.indices], top.values)
    stray = (cores.any(dim=1) & ~cells.any(dim=1)).flatten(1).sum(dim=1) / label.shape[1]
    count = 1 + (top.values[:, 1] > MIN_AREA).long() + (stray > MIN_AREA).long()
    masks = cells & (label[:, None] == top.indices[:, :, None, None, None])  # [B, 2, T, H, W]
    centroid, area = _centroids(masks)
    direction, pixels_per_frame = _motion(centroid)
    shape = _shapes(masks, centroid, area)
    return Verdict(
        count=count,
        background=background,
        shape=shape,
        colour=top.indices,
        direction=direction,
        size=_sizes(shape, area.median(dim=2).values),
        speed=_nearest(pixels_per_frame / FRAME_STRIDE, torch.tensor(PIXELS_PER_FRAME, device=device)),
        ink=_ink_share(label, masks.any(dim=1)),
    )


def _background(pixels: Tensor) -> Tensor:
    """Nearest background of the median of the outermost two pixels, [B]."""
    border = torch.cat(
        [
            part.flatten(1, 3)
            for part in (pixels[:, :, :2], pixels[:, :, -2:], pixels[:, :, :, :2], pixels[:, :, :, -2:])
        ],
        dim=1,
    )
    table = torch.tensor(BACKGROUND_RGB, device=pixels.device, dtype=torch.float32)
    return torch.cdist(border.median(dim=1).values, table).argmin(dim=1)


def _distance(pixels: Tensor, colour: Tensor) -> Tensor:
    """Squared distance of [B, T, H, W, 3] to one colour per clip [B, 3]."""
    return (pixels - colour[:, None, None, None]).square().sum(dim=-1)


def _erode(mask: Tensor) -> Tensor:
    """Drop the outermost ring of pixels of [B, T, H, W]."""
    return -F.max_pool2d(-mask.float(), 3, stride=1, padding=1) > 0.5


def _centroids(masks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, T, H, W] -> centroids (x, y) [B, S, T, 2] and areas [B, S, T] in pixels."""
    height, width = masks.shape[-2:]
    weight = masks.float()
    area = weight.sum(dim=(-1, -2))
    x = (weight.sum(dim=-2) * (torch.arange(width, device=masks.device) + 0.5)).sum(dim=-1)
    y = (weight.sum(dim=-1) * (torch.arange(height, device=masks.device) + 0.5)).sum(dim=-1)
    return torch.stack((x, y), dim=-1) / area.clamp_min(1)[..., None], area


def _cells(cores: Tensor, areas: Tensor) -> Tensor:
    """Which of two shapes each pixel belongs to: the power diagram of their cores [B, 2, T, H, W] -> the same, bool.

    A core too small to be a shape gets no pixels, the other gets all.
    """
    centroid, area = _centroids(cores)
    radius = 1.6 * (area / torch.pi).sqrt() + 1.5
    height, width = cores.shape[-2:]
    x = torch.arange(width, device=cores.device) + 0.5
    y = torch.arange(height, device=cores.device) + 0.5
    power = (x - centroid[..., 0, None, None]).square() + (y[:, None] - centroid[..., 1, None, None]).square()
    power = power - radius[..., None, None].square()
    power = power.masked_fill((areas <= MIN_AREA)[:, :, None, None, None], torch.inf)
    near = power < (2.0 * radius.square() + 40)[..., None, None]
    return (power == power.amin(dim=1, keepdim=True)) & near


def _motion(centroid: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares line through each path [B, S, T, 2] -> direction [B, S] and pixels per step of the path [B, S]."""
    frames = centroid.shape[2]
    time = torch.arange(frames, device=centroid.device, dtype=torch.float32) - (frames - 1) / 2
    slope = (centroid * time[:, None]).sum(dim=2) / time.square().sum()
    speed = slope.norm(dim=-1)
    directions = torch.tensor(UNIT_VECTORS, device=centroid.device)
    moving = (slope @ directions.T)[..., :STILL].argmax(dim=-1)
    return torch.where(speed * (frames - 1) < STILL_PIXELS, torch.full_like(moving, STILL), moving), speed


@functools.cache
def _unit_geometry() -> tuple[Tensor, Tensor]:
    """Area [S] and centroid (x, y) [S, 2] of each shape at radius 1, by counting pixels at radius 64."""
    axis = torch.arange(256, dtype=torch.float32) + 0.5 - 128
    x, y = axis.view(1, 1, 1, -1).expand(len(SHAPES), 1, 1, -1), axis.view(1, 1, -1, 1).expand(len(SHAPES), 1, -1, 1)
    inside = shape_distance(torch.arange(len(SHAPES)), torch.full((len(SHAPES),), 64.0), x, y) < 0
    centroid, area = _centroids(inside)
    return area[:, 0] / 64**2, (centroid[:, 0] - 128) / 64


def _shapes(masks: Tensor, centroid: Tensor, area: Tensor) -> Tensor:
    """The template with the best mean overlap (intersection over union), [B, S]."""
    device = masks.device
    unit_area, unit_centroid = (value.to(device) for value in _unit_geometry())
    picked = torch.linspace(0, masks.shape[2] - 1, TEMPLATE_FRAMES).round().long().to(device)
    masks, centroid, area = masks[:, :, picked], centroid[:, :, picked], area[:, :, picked]
    batch, slots, frames, height, width = masks.shape
    x = torch.arange(width, device=device) + 0.5 - centroid[..., 0, None]  # [B, S, F, W]
    y = torch.arange(height, device=device) + 0.5 - centroid[..., 1, None]
    overlaps = []
    for shape in range(len(SHAPES)):
        radius = (area / unit_area[shape]).sqrt().clamp_min(1).flatten()
        offset = unit_centroid[shape] * radius[:, None]
        dx = x.flatten(0, 2)[:, None, None] + offset[:, 0].view(-1, 1, 1, 1)
        dy = y.flatten(0, 2)[:, None, :, None] + offset[:, 1].view(-1, 1, 1, 1)
        template = shape_distance(torch.full((len(radius),), shape, device=device), radius, dx, dy)[:, 0] < 0
        template = template.view(batch, slots, frames, height, width)
        both = (template & masks).sum(dim=(-1, -2))
        either = (template | masks).sum(dim=(-1, -2)).clamp_min(1)
        overlaps.append((both / either).mean(dim=2))
    return torch.stack(overlaps, dim=-1).argmax(dim=-1)


def _sizes(shape: Tensor, area: Tensor) -> Tensor:
    """Nearest size of a shape [B, S] with so many pixels [B, S]."""
    radius = (area / _unit_geometry()[0].to(area.device)[shape]).sqrt()
    return _nearest(radius, torch.tensor(RADII, device=area.device))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    return (values[..., None] - table).abs().argmin(dim=-1)


def _ink_share(label: Tensor, shapes: Tensor) -> Tensor:
    """Of the pixels just outside the shapes [B, T, H, W], the share with the outline's colour: [B]."""
    colour = F.max_pool2d(shapes.float(), 3, stride=1, padding=1)  # Takes in the blended edge.
    ring = (F.max_pool2d(colour, 3, stride=1, padding=1) > 0.5) & (colour < 0.5)
    return ((label == -1) & ring).flatten(1).sum(dim=1) / ring.flatten(1).sum(dim=1).clamp_min(1)
