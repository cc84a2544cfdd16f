"""`config.json` of a checkpoint's transformer, compared with the model: number of heads and eps show in no shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hotreload.files import small_json
from hotreload.shown import shown
from hotreload.tables import label_of
from ipc.architecture import TransformerConfig
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component

MAX_CONFIG = 1 << 20
"""Bytes; Wan's have less than 1 KB."""
Numbers = dict[str, Callable[[TransformerConfig], float]]
KEYS: dict[str, Numbers] = {
    "WanTransformer3DModel": {
        "num_attention_heads": lambda c: c.num_attention_heads, "attention_head_dim": lambda c: c.attention_head_dim,
        "num_layers": lambda c: c.num_layers, "in_channels": lambda c: c.in_channels,
        "out_channels": lambda c: c.out_channels, "eps": lambda c: c.eps,
    },
    "WanModel": {
        "num_heads": lambda c: c.num_attention_heads, "dim": lambda c: c.dim, "num_layers": lambda c: c.num_layers,
        "in_dim": lambda c: c.in_channels, "out_dim": lambda c: c.out_channels, "eps": lambda c: c.eps,
    },
}  # fmt: skip
"""By `_class_name`: Diffusers' and the Wan repositories'. A config.json of another class is not compared."""


def check_config(transformer: Component, expected: TransformerConfig) -> None:
    """Raise `BadCheckpoint` if `config.json` beside a transformer's files says another number than the model has.

    ComfyUI's files have none, and a key that is not there says nothing.
    """
    path = Path(transformer.files[0]).with_name("config.json")
    label = label_of(transformer, path)
    try:
        said = small_json(path, MAX_CONFIG, dict[str, object])
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadCheckpoint(f"{label} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{label} is not a JSON object: {error}; download it again") from error
    for key, number in KEYS.get(str(said.get("_class_name")), {}).items():
        if key in said and (got := said[key]) != number(expected):
            text = type(got).__name__ if isinstance(got, (list, dict)) else shown(got)
            raise BadCheckpoint(
                f"{label}: {key} is {text}, expected {number(expected)}: it is another model's; choose it with --model"
            )
