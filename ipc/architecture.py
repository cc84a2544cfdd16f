"""The numbers that define a model's networks, as plain data.

Each struct mirrors the `config.json` of the component in a Diffusers checkpoint directory, with the same field names,
so that a YAML in `configs/models/` can be compared with a checkpoint before a byte of weights is read. The supervisor
passes them to stage processes, which build the modules from them; that is why they live beside the messages.

Source of the numbers: the Wan2.1 and Wan2.2 repositories.
"""

from __future__ import annotations

from typing import Literal

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
    image_dim: int | None = None
    """Width of the image tokens (CLIP) that the cross-attention sees beside the prompt; None: only the prompt."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A causal video VAE: Wan2.1's, stride (4, 8, 8), or with `is_residual` Wan2.2's, stride (4, 16, 16)."""

    base_dim: int
    z_dim: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    decoder_base_dim: int | None = None
    """None: as `base_dim`."""
    is_residual: bool = False
    """Wan2.2: averaging and repeating shortcuts around the down- and upsampling stages."""
    patch_size: int = 1
    """Pixels, along height and width, that are folded into channels before the encoder and unfolded at the end."""

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, along height and width."""
        return int(2 ** len(self.temporal_downsample)) * self.patch_size

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


class ImageEncoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A CLIP vision tower (transformers' `CLIPVisionModel`), of which all blocks but the last are run."""

    hidden_size: int
    num_hidden_layers: int
    """The last one included."""
    num_attention_heads: int
    intermediate_size: int
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Image tokens: one per patch and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


Conditioning = Literal["none", "channels", "first_frame"]
"""What an image means to a DiT. none: nothing, it only sees noise and the prompt; channels: a mask and the latents of
the image are concatenated to the noise (Wan2.1 and Wan2.2-A14B I2V); first_frame: the first latent frame is that of the
image, and its tokens have timestep 0 (Wan2.2-TI2V-5B)."""
