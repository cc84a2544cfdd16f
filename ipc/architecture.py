"""The numbers that define a model's networks, as plain data.

Each struct mirrors the `config.json` of the component in a Diffusers checkpoint directory, with the same field names,
so that a YAML in `configs/models/` can be compared with a checkpoint before a byte of weights is read. The supervisor
passes them to stage processes, which build the modules from them; that is why they live beside the messages.

Source of the numbers: the Wan2.1 and Wan2.2 repositories.
"""

from __future__ import annotations

import msgspec


class TransformerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Wan diffusion transformer (DiT)."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    text_len: int = 512
    """Rows of the prompt embedding that the cross-attention sees; real rows first, then zero rows."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Wan2.1 causal video VAE, stride (4, 8, 8)."""

    base_dim: int
    z_dim: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, along height and width."""
        return int(2 ** len(self.temporal_downsample))

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame after the first."""
        return int(2 ** sum(self.temporal_downsample))


class TextEncoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A UMT5 encoder (transformers' `UMT5EncoderModel`)."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
