"""Procedural clips for training `wan-demo`: flat shapes that move over a plain background.

A batch of scenes is a set of small integer tensors (`Scenes`); `render` draws them from signed distance functions, so a
clip costs a few elementwise kernels on the GPU and has exact anti-aliased edges. Every ninth shape-colour-direction
combination is held out of training (`is_held_out`), which is what the adherence figures are measured on.

Coordinates are pixels, x to the right and y down, at a canvas of `SIZE` x `SIZE`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

FRAMES, SIZE, FPS = 17, 96, 8

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
DIRECTIONS = ("left", "right", "up", "down", "up-left", "up-right", "down-left", "down-right", "still")
SIZES = ("small", "medium", "large")
SPEEDS = ("slow", "medium", "fast")
BACKGROUNDS = ("black", "white", "gray", "navy", "beige")
STYLES = ("flat", "outlined")
STILL = DIRECTIONS.index("still")

COLOUR_RGB = (
    (225, 40, 40), (40, 175, 70), (45, 95, 235), (250, 215, 45), (245, 135, 25), (140, 60, 190), (40, 205, 225),
    (250, 130, 190),
)  # fmt: skip
BACKGROUND_RGB = ((10, 10, 10), (245, 245, 245), (130, 130, 130), (20, 25, 85), (222, 200, 160))
INK_RGB = ((245, 245, 245), (10, 10, 10), (10, 10, 10), (245, 245, 245), (10, 10, 10))
"""Outline colour of the "outlined" style on each background."""

RADII = (8.0, 12.0, 17.0)
"""Pixels, per size, before the shape's own factor in `EXTENTS`."""
PIXELS_PER_FRAME = (0.7, 1.4, 2.2)
EXTENTS = (1.0, 1.28, 1.3, 1.4, 1.15, 1.3)
"""Radius of the circle around each shape, as a multiple of its size's radius."""
OUTLINE = 2.5
MARGIN = 2.0 + OUTLINE
_DIAGONAL = 2**-0.5
UNIT_VECTORS = (
    (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (-_DIAGONAL, -_DIAGONAL), (_DIAGONAL, -_DIAGONAL),
    (-_DIAGONAL, _DIAGONAL), (_DIAGONAL, _DIAGONAL), (0.0, 0.0),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A batch of B scenes with one or two shapes each; slot 1 is meaningless where `count` is 1.

    Tensors: count, background [B]; shape, colour, direction, size, speed [B, 2] int64;
    start [B, 2, 2] float32 centre at frame 0 as (x, y).
    """

    count: Tensor
    background: Tensor
    shape: Tensor
    colour: Tensor
    direction: Tensor
    size: Tensor
    speed: Tensor
    start: Tensor

    def __len__(self) -> int:
        return self.count.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{name: value[index] for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Field name to tensor."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(**{name: value.to(device) for name, value in self.tensors().items()})

    @property
    def radius(self) -> Tensor:
        """Size in pixels, [B, 2] float32."""
        return torch.tensor(RADII, device=self.size.device)[self.size]

    @property
    def extent(self) -> Tensor:
        """Radius of the circle around each shape, [B, 2] float32 pixels."""
        return self.radius * torch.tensor(EXTENTS, device=self.shape.device)[self.shape]

    @property
    def velocity(self) -> Tensor:
        """Pixels per frame, [B, 2, 2] float32."""
        return _velocity(self.direction, self.speed)


def is_held_out(shape: int | Tensor, colour: int | Tensor, direction: int | Tensor) -> bool | Tensor:
    """Whether a combination never occurs in training: every ninth, spread over all attributes."""
    return (2 * shape + 4 * colour + direction) % 9 == 5


def combinations(held_out: bool) -> Tensor:
    """All (shape, colour, direction) triples of one split, [N, 3] int64."""
    sizes = (len(SHAPES), len(COLOURS), len(DIRECTIONS))
    triples = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    mask = is_held_out(triples[:, 0], triples[:, 1], triples[:, 2])
    return triples[mask == held_out]


def sample_scenes(
    batch: int, generator: torch.Generator, *, held_out: bool = False, two_shapes: float = 0.4, margin: float = MARGIN
) -> Scenes:
    """Draw scenes on the generator's device; every shape stays inside the canvas for the whole clip.

    `two_shapes` is the share of scenes with two shapes, which differ in colour, are small or medium, and keep apart.
    """
    device = generator.device

    def randint(high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    table = combinations(held_out).to(device)
    count = 1 + (torch.rand(batch, generator=generator, device=device) < two_shapes).long()
    first = table[randint(len(table), (batch,))]
    candidates = table[randint(len(table), (batch, 16))]
    differs = candidates[..., 1] != first[:, None, 1]
    second = candidates[torch.arange(batch, device=device), differs.int().argmax(dim=1)]
    triples = torch.stack((first, second), dim=1)
    size = randint(len(SIZES), (batch, 2))
    small_or_medium = randint(2, (batch, 2))
    scenes = Scenes(
        count=count,
        background=randint(len(BACKGROUNDS), (batch,)),
        shape=triples[..., 0],
        colour=triples[..., 1],
        direction=triples[..., 2],
        size=torch.where(count[:, None] == 2, small_or_medium, size),
        speed=randint(len(SPEEDS), (batch, 2)),
        start=torch.zeros(batch, 2, 2, device=device),
    )
    return dataclasses.replace(scenes, start=_place(scenes, generator, margin))


def render(
    scenes: Scenes, *, style: int | Tensor = 0, frames: int = FRAMES, size: int = SIZE, origin: Tensor | None = None
) -> Tensor:
    """Draw scenes as clips [B, 3, frames, size, size] float32 in [-1, 1].

    `style` indexes `STYLES`, one for all or one per scene ([B]). Shapes are drawn in order, each over the last.
    `origin` [B, 2] is the canvas pixel (x, y) at the clip's top left corner, (0, 0) if not given.
    """
    device = scenes.count.device
    outlined = torch.as_tensor(style, device=device).expand(len(scenes)).view(-1, 1, 1, 1, 1) == 1
    image = _rgb(BACKGROUND_RGB, device)[scenes.background][:, :, None, None, None]
    ink = _rgb(INK_RGB, device)[scenes.background][:, :, None, None, None]
    time = torch.arange(frames, device=device, dtype=torch.float32)
    axis = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    for slot in range(2):
        centre = scenes.start[:, slot, None] + scenes.velocity[:, slot, None] * time[:, None]  # [B, T, 2]
        if origin is not None:
            centre = centre - origin[:, None]
        x = axis[None, None, None, :] - centre[..., 0, None, None]
        y = axis[None, None, :, None] - centre[..., 1, None, None]
        distance = shape_distance(scenes.shape[:, slot], scenes.radius[:, slot], x, y)[:, None]
        shown = (scenes.count > slot).view(-1, 1, 1, 1, 1)
        fill = _rgb(COLOUR_RGB, device)[scenes.colour[:, slot]][:, :, None, None, None]
        image = torch.lerp(image, ink, ((0.5 + OUTLINE - distance).clamp(0, 1) * (shown & outlined)))
        image = torch.lerp(image, fill, (0.5 - distance).clamp(0, 1) * shown)
    return image.expand(-1, -1, frames, size, size) / 127.5 - 1


def crop_origins(scenes: Scenes, size: int, generator: torch.Generator) -> Tensor:
    """Where to cut a square of `size` pixels so that it shows a shape at some time: [B, 2] whole pixels (x, y)."""
    device = generator.device
    uniform = torch.rand(len(scenes), 4, generator=generator, device=device)
    slot = (uniform[:, 0] * scenes.count).long()
    row = torch.arange(len(scenes), device=device)
    centre = scenes.start[row, slot] + scenes.velocity[row, slot] * (uniform[:, 1:2] * (FRAMES - 1))
    return (centre - size / 2 + (uniform[:, 2:] - 0.5) * size * 0.6).clamp(0, SIZE - size).round()


def shape_distance(shape: Tensor, radius: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance in pixels to each shape's edge, negative inside.

    shape, radius: [B]; x: [B, T, 1, W] and y: [B, T, H, 1] offsets from the centre; returns [B, T, H, W].
    """
    scale = radius.view(-1, 1, 1, 1)
    x, y = torch.broadcast_tensors(x / scale, y / scale)
    distances = (_circle(x, y), _square(x, y), _triangle(x, y), _star(x, y), _cross(x, y), _diamond(x, y))
    index = shape.view(-1, 1, 1, 1)
    result = distances[0]
    for number, distance in enumerate(distances[1:], start=1):
        result = torch.where(index == number, distance, result)
    return result * scale


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(dx.clamp_min(0), dy.clamp_min(0)) + torch.maximum(dx, dy).clamp_max(0)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.9, 0.9)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    side = 1.3 * _DIAGONAL
    return _box((x + y) * _DIAGONAL, (x - y) * _DIAGONAL, side, side)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.1, 0.38), _box(x, y, 0.38, 1.1))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, pointing up; centre of mass at the origin, corners at distance 1.3."""
    half_side = 1.3 * 3**0.5 / 2
    k = 3**0.5
    x, y = x.abs() - half_side, -y + half_side / k
    fold = x + k * y > 0
    x, y = torch.where(fold, (x - k * y) / 2, x), torch.where(fold, (-k * x - y) / 2, y)
    x = x - x.clamp(-2 * half_side, 0)
    return -torch.hypot(x, y) * torch.sign(y)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points at distance 1.4, inner corners at 0.45 of that; pointing up."""
    outer, ratio = 1.4, 0.45
    k1x, k1y = 0.809016994375, -0.587785252292
    x, y = x.abs(), -y
    reflect = (k1x * x + k1y * y).clamp_min(0)
    x, y = x - 2 * reflect * k1x, y - 2 * reflect * k1y
    reflect = (-k1x * x + k1y * y).clamp_min(0)
    x, y = x + 2 * reflect * k1x, y - 2 * reflect * k1y
    x, y = x.abs(), y - outer
    bax, bay = ratio * -k1y, ratio * k1x - 1.0
    along = ((x * bax + y * bay) / (bax * bax + bay * bay)).clamp(0, outer)
    return torch.hypot(x - bax * along, y - bay * along) * torch.sign(y * bax - x * bay)


def _rgb(table: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(table, device=device, dtype=torch.float32)


def _velocity(direction: Tensor, speed: Tensor) -> Tensor:
    unit = torch.tensor(UNIT_VECTORS, device=direction.device)[direction]
    return unit * torch.tensor(PIXELS_PER_FRAME, device=speed.device)[speed][..., None]


def _place(scenes: Scenes, generator: torch.Generator, margin: float, tries: int = 48) -> Tensor:
    """Centres at frame 0, [B, 2, 2]: inside the canvas all along, two shapes 3 pixels or more apart if possible."""
    device = scenes.count.device
    travel = scenes.velocity * (FRAMES - 1)
    extent = scenes.extent[..., None] + margin
    low = extent + (-travel).clamp_min(0)
    high = SIZE - extent - travel.clamp_min(0)
    uniform = torch.rand(len(scenes), tries, 2, 2, generator=generator, device=device)
    start = low[:, None] + uniform * (high - low)[:, None]  # [B, tries, slot, xy]
    time = torch.arange(FRAMES, device=device, dtype=torch.float32)
    apart = (start[:, :, 1] - start[:, :, 0])[:, :, None] + (
        (scenes.velocity[:, 1] - scenes.velocity[:, 0])[:, None, None] * time[:, None]
    )
    gap = apart.norm(dim=-1).amin(dim=2) - scenes.extent.sum(dim=1)[:, None]  # [B, tries]
    best = torch.where(gap.amax(dim=1) > 3.0, (gap > 3.0).int().argmax(dim=1), gap.argmax(dim=1))
    best = torch.where(scenes.count == 2, best, 0)
    return start[torch.arange(len(scenes), device=device), best]
