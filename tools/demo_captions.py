"""Captions for the procedural scenes, in many wordings and orders.

`caption` draws one sentence for one scene. Shape, colour, direction and background are always named unless
`Wording.omissions` allows otherwise; size and speed are named about two times in three, and are random otherwise.
"""

from __future__ import annotations

import dataclasses
from random import Random

from tools.demo_scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, STILL, Scenes

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "disk", "ball", "round shape"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "equilateral triangle"),
    "star": ("star", "star", "five-pointed star"),
    "cross": ("cross", "cross", "plus", "plus sign"),
    "diamond": ("diamond", "diamond", "rhombus", "lozenge"),
}
COLOUR_WORDS = {
    "red": ("red", "red", "crimson", "scarlet"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "cobalt", "royal blue"),
    "yellow": ("yellow", "yellow", "lemon", "golden"),
    "orange": ("orange", "orange", "tangerine"),
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise", "aqua"),
    "pink": ("pink", "pink", "rose"),
}
DIRECTION_WORDS = {
    "left": ("left", "left", "to the left", "leftwards", "leftward", "toward the left"),
    "right": ("right", "right", "to the right", "rightwards", "rightward", "toward the right"),
    "up": ("up", "up", "upwards", "upward", "to the top"),
    "down": ("down", "down", "downwards", "downward", "to the bottom"),
    "up-left": (
        "up and left", "up-left", "up and to the left", "diagonally up and left", "to the upper left",
        "to the top left",
    ),
    "up-right": (
        "up and right", "up-right", "up and to the right", "diagonally up and right", "to the upper right",
        "to the top right",
    ),
    "down-left": (
        "down and left", "down-left", "down and to the left", "diagonally down and left", "to the lower left",
        "to the bottom left",
    ),
    "down-right": (
        "down and right", "down-right", "down and to the right", "diagonally down and right", "to the lower right",
        "to the bottom right",
    ),
}  # fmt: skip
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
SPEED_WORDS = {
    "slow": ("slowly", "slowly", "gently", "at a slow speed"),
    "medium": ("steadily", "at medium speed", "at a moderate speed"),
    "fast": ("quickly", "fast", "rapidly", "at high speed"),
}
BACKGROUND_WORDS = {
    "black": ("black", "black", "jet black"),
    "white": ("white", "white", "plain white"),
    "gray": ("gray", "grey"),
    "navy": ("navy", "navy blue", "dark blue"),
    "beige": ("beige", "beige", "sand", "cream"),
}
VERBS = (("moves", "moving"), ("moves", "moving"), ("goes", "going"), ("drifts", "drifting"), ("slides", "sliding"),
         ("travels", "travelling"), ("glides", "gliding"), ("floats", "floating"))  # fmt: skip
STILL_WORDS = (
    "stays still",
    "standing still",
    "not moving",
    "is still",
    "at rest",
    "is stationary",
    "does not move",
    "remains still",
)
STILL_ADJECTIVES = ("still", "stationary", "motionless")
PREFIXES = (
    "a video of ",
    "an animation of ",
    "a short clip of ",
    "animation: ",
    "video: ",
    "please show ",
    "a scene with ",
)
SUFFIXES = (", high quality", ", 4k", ", simple animation", ", flat design", ", smooth motion", ", 8 fps", " please")


@dataclasses.dataclass(frozen=True)
class Wording:
    """How far captions stray from plain sentences that name everything.

    omissions: chance that direction, background, colour or shape goes unnamed, each. details: chance that size and
    speed are named, each. filler: chance of a phrase that means nothing for the picture. noise: chance of a made-up
    word, which teaches the encoder to pass over unknown ones.
    """

    omissions: float = 0.03
    details: float = 0.65
    filler: float = 0.08
    noise: float = 0.03


DETAILED = Wording(omissions=0.0, details=1.0, filler=0.0, noise=0.0)
BRIEF = dataclasses.replace(DETAILED, details=0.0)
"""Prompts that name shape, colour, direction and background, with and without size and speed: for adherence."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One shape of a scene, by name; `None` goes unnamed."""

    shape: str | None
    colour: str | None
    direction: str | None
    size: str | None
    speed: str | None


def captions(scenes: Scenes, rng: Random, wording: Wording, per_scene: int = 1) -> list[str]:
    """`per_scene` captions for each scene, scene by scene."""
    columns = {name: value.tolist() for name, value in scenes.tensors().items() if name != "start"}
    lines = []
    for index in range(len(scenes)):
        row = {name: values[index] for name, values in columns.items()}
        lines += [_describe(row, rng, wording) for _ in range(per_scene)]
    return lines


def caption(rng: Random, items: list[Item], background: str | None, wording: Wording = BRIEF) -> str:
    """One sentence for one or two shapes over a background."""
    items = rng.sample(items, len(items))
    if rng.random() < 0.12:
        text = _keywords(rng, items, background)
    else:
        text = _sentence(rng, [_item(rng, item) for item in items], background)
    if rng.random() < wording.filler:
        text = rng.choice(PREFIXES) + text if rng.random() < 0.5 else text + rng.choice(SUFFIXES)
    if rng.random() < wording.noise:
        text = _with_noise(rng, text)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:] + rng.choice((".", ".", "!", ""))
    return text


def _describe(row: dict[str, int | list[int]], rng: Random, wording: Wording) -> str:
    def named(names: tuple[str, ...], number: int, chance: float) -> str | None:
        return names[number] if rng.random() < chance else None

    always = 1.0 - wording.omissions
    items = []
    for slot in range(row["count"]):
        direction = named(DIRECTIONS, row["direction"][slot], always)
        moves = direction is not None and row["direction"][slot] != STILL
        items.append(
            Item(
                shape=named(SHAPES, row["shape"][slot], always),
                colour=named(COLOURS, row["colour"][slot], always),
                direction=direction,
                size=named(SIZES, row["size"][slot], wording.details),
                speed=named(SPEEDS, row["speed"][slot], wording.details) if moves else None,
            )
        )
    return caption(rng, items, named(BACKGROUNDS, row["background"], always), wording)


def _item(rng: Random, item: Item) -> str:
    """A noun phrase with its motion: "a small crimson disc drifting up slowly"."""
    shape = rng.choice(SHAPE_WORDS[item.shape]) if item.shape else "shape"
    words = [rng.choice(SIZE_WORDS[item.size])] if item.size else []
    colour = rng.choice(COLOUR_WORDS[item.colour]) if item.colour else None
    after = ""
    if colour and rng.random() < 0.05:
        after = f" in {colour}"
    elif colour:
        words.append(colour)
    adjective = item.direction == "still" and rng.random() < 0.4
    if adjective:
        words.insert(0, rng.choice(STILL_ADJECTIVES))
    article = rng.choice(("a", "a", "a", "one", "the", ""))
    if article == "a" and [*words, shape][0][0] in "aeiou":
        article = "an"
    noun = " ".join([*([article] if article else []), *words, shape]) + after
    motion = "" if adjective or item.direction is None else " " + _motion(rng, item)
    return noun + motion


def _motion(rng: Random, item: Item) -> str:
    assert item.direction is not None
    if item.direction == "still":
        return rng.choice(STILL_WORDS)
    verb = rng.choice(rng.choice(VERBS))
    where = rng.choice(DIRECTION_WORDS[item.direction])
    if item.speed is None:
        return f"{verb} {where}"
    speed = rng.choice(SPEED_WORDS[item.speed])
    if speed.endswith("ly") and rng.random() < 0.5:
        return f"{speed} {verb} {where}"
    return f"{verb} {where} {speed}"


def _sentence(rng: Random, phrases: list[str], background: str | None) -> str:
    scene = phrases[0]
    if len(phrases) == 2:
        joined = rng.choice(("{0} and {1}", "{0} and {1}", "{0}, {1}", "{0} while {1}", "two shapes: {0} and {1}",
                             "{0}; {1}",
                             "{0} with {1}", "two shapes, {0} and {1}"))  # fmt: skip
        scene = joined.format(*phrases)
    if background is None:
        return scene
    colour = rng.choice(BACKGROUND_WORDS[background])
    form = rng.choice((
        "{scene} on a {bg} background", "{scene} on a {bg} background", "{scene} over {bg}",
        "{scene} against a {bg} backdrop",
        "{scene} on {bg}", "{scene}, {bg} background", "on a {bg} background, {scene}", "{bg} background: {scene}",
        "over a {bg} background {scene}", "{scene} in front of a {bg} background", "{scene}, the background is {bg}",
    ))  # fmt: skip
    return str(form.format(scene=scene, bg=colour))


def _keywords(rng: Random, items: list[Item], background: str | None) -> str:
    """Bare words: "red circle, left, fast, black background"."""
    parts = []
    for item in items:
        noun = [rng.choice(SIZE_WORDS[item.size])] if item.size else []
        noun += [rng.choice(COLOUR_WORDS[item.colour])] if item.colour else []
        noun.append(rng.choice(SHAPE_WORDS[item.shape]) if item.shape else "shape")
        parts.append(" ".join(noun))
        if item.direction == "still":
            parts.append("still")
        elif item.direction:
            parts.append(rng.choice(DIRECTION_WORDS[item.direction]))
        if item.speed:
            parts.append(rng.choice((item.speed, rng.choice(SPEED_WORDS[item.speed]))))
    if background:
        where = f"{rng.choice(BACKGROUND_WORDS[background])} background"
        parts.insert(rng.choice((0, len(parts))), where)
    return ", ".join(parts)


def _with_noise(rng: Random, text: str) -> str:
    """Insert a made-up word of letters, or a few characters from anywhere in Unicode's first planes."""
    if rng.random() < 0.7:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 6)))
    else:
        word = "".join(chr(rng.choice((rng.randint(0xA1, 0x24F), rng.randint(0x4E00, 0x9FA5)))) for _ in range(2))
    words = text.split(" ")
    words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)
