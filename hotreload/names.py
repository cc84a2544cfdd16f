"""Tensor names of the Wan repositories ("original") and ours (Diffusers'; transformers' for the encoders), both ways.

A rule is a pair of templates: `#` stands for a number, a final `.*` for the parameter (`.weight`, `.bias`, `.gamma`).
Names that no rule knows stay as they are, so that whoever compares with a model names them as the file does.

Source: the Wan2.1 and Wan2.2 repositories; Diffusers' WanTransformer3DModel and AutoencoderKLWan, transformers' UMT5
and CLIP. All Wan VAEs have two residual blocks per stage, three in the decoder; the numbers below come from that.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hotreload.safetensors_file import TensorEntry
from hotreload.shown import shown
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Naming

Rule = tuple[str, str]
"""(original, ours)."""

PREFIXES = ("model.diffusion_model.",)
"""What ComfyUI may put before every name of a transformer."""


def _attention(original: str, ours: str) -> list[Rule]:
    linears = [(f"{original}.{x}.*", f"{ours}.to_{x}.*") for x in "qkv"]
    norms = [(f"{original}.norm_{x}.*", f"{ours}.norm_{x}.*") for x in "qk"]
    return [*linears, (f"{original}.o.*", f"{ours}.to_out.0.*"), *norms]


TRANSFORMER: list[Rule] = [
    ("patch_embedding.*", "patch_embedding.*"),
    ("time_embedding.0.*", "condition_embedder.time_embedder.linear_1.*"),
    ("time_embedding.2.*", "condition_embedder.time_embedder.linear_2.*"),
    ("time_projection.1.*", "condition_embedder.time_proj.*"),
    ("text_embedding.0.*", "condition_embedder.text_embedder.linear_1.*"),
    ("text_embedding.2.*", "condition_embedder.text_embedder.linear_2.*"),
    ("img_emb.proj.0.*", "condition_embedder.image_embedder.norm1.*"),
    ("img_emb.proj.1.*", "condition_embedder.image_embedder.ff.net.0.proj.*"),
    ("img_emb.proj.3.*", "condition_embedder.image_embedder.ff.net.2.*"),
    ("img_emb.proj.4.*", "condition_embedder.image_embedder.norm2.*"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.*", "proj_out.*"),
    ("blocks.#.modulation", "blocks.#.scale_shift_table"),
    ("blocks.#.norm3.*", "blocks.#.norm2.*"),
    ("blocks.#.ffn.0.*", "blocks.#.ffn.net.0.proj.*"),
    ("blocks.#.ffn.2.*", "blocks.#.ffn.net.2.*"),
    *_attention("blocks.#.self_attn", "blocks.#.attn1"),
    *_attention("blocks.#.cross_attn", "blocks.#.attn2"),
    ("blocks.#.cross_attn.k_img.*", "blocks.#.attn2.add_k_proj.*"),
    ("blocks.#.cross_attn.v_img.*", "blocks.#.attn2.add_v_proj.*"),
    ("blocks.#.cross_attn.norm_k_img.*", "blocks.#.attn2.norm_added_k.*"),
]

TEXT_ENCODER: list[Rule] = [
    ("token_embedding.*", "shared.*"),
    ("norm.*", "encoder.final_layer_norm.*"),
    ("blocks.#.norm1.*", "encoder.block.#.layer.0.layer_norm.*"),
    *((f"blocks.#.attn.{x}.*", f"encoder.block.#.layer.0.SelfAttention.{x}.*") for x in "qkvo"),
    ("blocks.#.pos_embedding.embedding.*", "encoder.block.#.layer.0.SelfAttention.relative_attention_bias.*"),
    ("blocks.#.norm2.*", "encoder.block.#.layer.1.layer_norm.*"),
    ("blocks.#.ffn.gate.0.*", "encoder.block.#.layer.1.DenseReluDense.wi_0.*"),
    ("blocks.#.ffn.fc1.*", "encoder.block.#.layer.1.DenseReluDense.wi_1.*"),
    ("blocks.#.ffn.fc2.*", "encoder.block.#.layer.1.DenseReluDense.wo.*"),
]

_CLIP_BLOCK = ("visual.transformer.#", "vision_model.encoder.layers.#")
IMAGE_ENCODER: list[Rule] = [
    ("visual.cls_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.patch_embedding.*", "vision_model.embeddings.patch_embedding.*"),
    ("visual.pre_norm.*", "vision_model.pre_layrnorm.*"),
    *(
        (f"{_CLIP_BLOCK[0]}.{original}.*", f"{_CLIP_BLOCK[1]}.{ours}.*")
        for original, ours in (
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.out_proj"),
            ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"),
        )
    ),
]  # fmt: skip
_CLIP_QKV = re.compile(r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)")
_CLIP_Q_K_V = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_CLIP_BARE = re.compile(r"(embeddings|pre_layrnorm|encoder|post_layernorm)\.")
"""How transformers >= 5 saves what it saved below `vision_model.` before."""
_CLIP_LAYER = re.compile(r"vision_model\.encoder\.layers\.([0-9]{1,4})\.")
_CLIP_LEADING_ONES = {
    "vision_model.embeddings.class_embedding": 2,
    "vision_model.embeddings.position_embedding.weight": 1,
}
"""Dimensions of length 1 that the original has before ours."""


def _residual(original: str, ours: str) -> list[Rule]:
    parts = (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"))
    return [(f"{original}.{a}.*", f"{ours}.{b}.*") for a, b in (*parts, ("shortcut", "conv_shortcut"))]


def _resample(original: str, ours: str) -> list[Rule]:
    return [(f"{original}.{x}.*", f"{ours}.{x}.*") for x in ("resample.1", "time_conv")]


def _vae_ends(half: str) -> list[Rule]:
    middle, mid_block = f"{half}.middle", f"{half}.mid_block"
    return [
        (f"{half}.conv1.*", f"{half}.conv_in.*"),
        *_residual(f"{middle}.0", f"{mid_block}.resnets.0"),
        *((f"{middle}.1.{x}.*", f"{mid_block}.attentions.0.{x}.*") for x in ("norm", "to_qkv", "proj")),
        *_residual(f"{middle}.2", f"{mid_block}.resnets.1"),
        (f"{half}.head.0.*", f"{half}.norm_out.*"),
        (f"{half}.head.2.*", f"{half}.conv_out.*"),
    ]


def _counted_through(stage: int) -> list[Rule]:
    """A stage of Wan2.1's decoder, which counts the blocks of all stages through."""
    blocks = (
        _residual(f"decoder.upsamples.{4 * stage + i}", f"decoder.up_blocks.{stage}.resnets.{i}") for i in range(3)
    )
    return [
        *itertools.chain.from_iterable(blocks),
        *_resample(f"decoder.upsamples.{4 * stage + 3}", f"decoder.up_blocks.{stage}.upsamplers.0"),
    ]


VAE_BOTH: list[Rule] = [
    ("conv1.*", "quant_conv.*"),
    ("conv2.*", "post_quant_conv.*"),
    *_vae_ends("encoder"),
    *_vae_ends("decoder"),
]
VAE_PLAIN: list[Rule] = [
    *_residual("encoder.downsamples.#", "encoder.down_blocks.#"),
    *_resample("encoder.downsamples.#", "encoder.down_blocks.#"),
    *itertools.chain.from_iterable(_counted_through(stage) for stage in range(4)),
]
"""Wan2.1's."""
VAE_RESIDUAL: list[Rule] = [
    *_residual("encoder.downsamples.#.downsamples.#", "encoder.down_blocks.#.resnets.#"),
    *_resample("encoder.downsamples.#.downsamples.2", "encoder.down_blocks.#.downsampler"),
    *_residual("decoder.upsamples.#.upsamples.#", "decoder.up_blocks.#.resnets.#"),
    *_resample("decoder.upsamples.#.upsamples.3", "decoder.up_blocks.#.upsampler"),
]
"""Wan2.2's."""

RULES: dict[str, list[Rule]] = {
    "transformer": TRANSFORMER,
    "transformer_2": TRANSFORMER,
    "text_encoder": TEXT_ENCODER,
    "image_encoder": IMAGE_ENCODER,
    "vae": [*VAE_BOTH, *VAE_PLAIN, *VAE_RESIDUAL],
}

UNUSED: dict[str, re.Pattern[str]] = {
    "text_encoder": re.compile(r"spiece_model"),
    "image_encoder": re.compile(
        r"visual\.(post_norm|head)(\..*)?|textual\..*|log(it)?_scale|"
        r"vision_model\.(post_layernorm\..*|embeddings\.position_ids)|(visual|text)_projection\..*|text_model\..*"
    ),
}
"""Tensors of whole models that our part of them does not use. CLIP's last block joins them: see `to_ours`."""


class Original(NamedTuple):
    """A tensor as the Wan repositories store it: the bytes of `parts` (our names), one after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]


def our_name(component: str, original: str) -> str | None:
    """Ours for an original name; None if no rule knows it, or if it is several of ours (CLIP's `to_qkv`)."""
    return _translate(_compiled(component, inverse=False), original)


def original_name(component: str, ours: str, *, residual: bool = False) -> str | None:
    """The original of one of our names; None if there is none. `residual`: of a Wan2.2 VAE."""
    if component == "image_encoder" and (match := _CLIP_Q_K_V.fullmatch(ours)):
        return f"visual.transformer.{match[1]}.attn.to_qkv.{match[3]}"
    return _translate(_compiled(component, inverse=True, residual=residual), ours)


def stored_name(component: str, naming: Naming, ours: str, *, residual: bool = False) -> str:
    """The name of a tensor in a file, for one of ours. One of CLIP's three in `to_qkv` keeps ours: it is no tensor of
    the file's own."""
    if naming == "diffusers" or (component == "image_encoder" and _CLIP_Q_K_V.fullmatch(ours)):
        return ours
    return original_name(component, ours, residual=residual) or ours


def to_original(
    component: str, shapes: Mapping[str, tuple[int, ...]], *, residual: bool = False
) -> dict[str, Original]:
    """How the Wan repositories would store tensors of these names and shapes (ours), by original name."""
    parts: dict[str, list[str]] = {}
    for ours in shapes:
        original = original_name(component, ours, residual=residual)
        if original is None:
            raise ValueError(f"{component} has no tensor {ours!r} in the Wan repositories")
        parts.setdefault(original, []).append(ours)
    return {original: _joined(component, original, names, shapes[names[0]]) for original, names in parts.items()}


def _joined(component: str, original: str, names: list[str], shape: tuple[int, ...]) -> Original:
    if component == "image_encoder":
        names = sorted(names, key=lambda name: "qkv".index(match[2]) if (match := _CLIP_Q_K_V.fullmatch(name)) else 0)
        shape = (1,) * _CLIP_LEADING_ONES.get(names[0], 0) + (shape[0] * len(names), *shape[1:])
    return Original(original, shape, tuple(names))


def to_ours(component: str, naming: Naming, entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors that we use, under our names; unused ones are left out, unknown ones keep their names.

    Raises `BadCheckpoint` for two tensors of one name.
    """
    table: dict[str, TensorEntry] = {}
    unused = UNUSED.get(component)
    for entry in entries:
        for ours in _renamed(component, naming, entry):
            if unused is not None and unused.fullmatch(ours.name):
                continue
            if (other := table.get(ours.name)) is not None:
                raise BadCheckpoint(
                    f"{component}: '{shown(entry.name)}' is in both {shown(other.file.name)} and "
                    f"{shown(entry.file.name)}"
                )
            table[ours.name] = ours
    return _without_last_block(table) if component == "image_encoder" else table


def without_prefix(name: str) -> str:
    """A name of a transformer without what ComfyUI puts before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _renamed(component: str, naming: Naming, entry: TensorEntry) -> list[TensorEntry]:
    name = without_prefix(entry.name) if component.startswith("transformer") else entry.name
    if naming == "diffusers":
        bare = component == "image_encoder" and _CLIP_BARE.match(name)
        return [entry._replace(name=f"vision_model.{name}" if bare else name)]
    if component == "image_encoder" and (match := _CLIP_QKV.fullmatch(name)):
        return _split_qkv(entry, f"vision_model.encoder.layers.{match[1]}.self_attn", match[2])
    ours = our_name(component, name) or name
    ones = _CLIP_LEADING_ONES.get(ours, 0) if component == "image_encoder" else 0
    shape = entry.shape[ones:] if entry.shape[:ones] == (1,) * ones else entry.shape
    return [entry._replace(name=ours, shape=shape)]


def _split_qkv(entry: TensorEntry, attention: str, leaf: str) -> list[TensorEntry]:
    """Queries, keys and values of one tensor: three stretches of its rows."""
    rows, rest = divmod(entry.shape[0] if entry.shape else 0, 3)
    if rest or not rows:
        return [entry]
    shape, size = (rows, *entry.shape[1:]), entry.size // 3
    names = [f"{attention}.{x}_proj.{leaf}" for x in "qkv"]
    return [entry._replace(name=n, shape=shape, offset=entry.offset + i * size, size=size) for i, n in enumerate(names)]


def _without_last_block(table: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Our CLIP runs all blocks but the last, so what a checkpoint has of the last is unused."""
    layers = {name: int(match[1]) for name in table if (match := _CLIP_LAYER.match(name))}
    last = max(layers.values(), default=math.inf)
    return {name: entry for name, entry in table.items() if layers.get(name) != last}


class _Compiled(NamedTuple):
    pattern: re.Pattern[str]
    replacement: str


@functools.cache
def _compiled(component: str, *, inverse: bool, residual: bool = False) -> dict[int, list[_Compiled]]:
    """The rules of a component by the number of dots in the names they are for."""
    rules = RULES[component]
    if inverse and component == "vae":
        rules = [*VAE_BOTH, *(VAE_RESIDUAL if residual else VAE_PLAIN)]
    compiled: dict[int, list[_Compiled]] = {}
    for rule in rules:
        source, target = rule[::-1] if inverse else rule
        pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", "(weight|bias|gamma)")
        pieces = re.split(r"[#*]", target)
        replacement = "".join(f"{piece}\\g<{i}>" for i, piece in enumerate(pieces[:-1], 1)) + pieces[-1]
        compiled.setdefault(source.count("."), []).append(_Compiled(re.compile(pattern), replacement))
    return compiled


def _translate(rules: dict[int, list[_Compiled]], name: str) -> str | None:
    for rule in rules.get(name.count("."), ()):
        if match := rule.pattern.fullmatch(name):
            return match.expand(rule.replacement)
    return None
