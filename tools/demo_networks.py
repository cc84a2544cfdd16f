"""The networks of `wan-demo`: their numbers, and the two forward passes that training needs and inference does not.

The modules are the engine's own (`stages.models`) and transformers' UMT5 encoder; training adds nothing to them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from ipc.architecture import TextEncoderConfig, TransformerConfig, VaeConfig
from stages.kernels.plain import modulate
from stages.models.transformer import Block, Compute, Stream, WanTransformer
from stages.models.vae import WanVae
from tools.demo_tokenizer import PAD_ID

Z_DIM = 16
RunBlock = Callable[[Block, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The three networks' numbers; the VAE's latent statistics are measured after its training."""

    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig


def vae_config(
    mean: tuple[float, ...] = (0.0,) * Z_DIM, std: tuple[float, ...] = (1.0,) * Z_DIM, **numbers: object
) -> VaeConfig:
    """The demo's VAE with given latent statistics."""
    return VaeConfig(**{"base_dim": 16, "dim_mult": (1, 2, 2, 3), "num_res_blocks": 1, **numbers,
                        "z_dim": Z_DIM, "latents_mean": mean, "latents_std": std})  # fmt: skip


DEMO = Architecture(
    text_encoder=TextEncoderConfig(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    transformer=TransformerConfig(
        num_attention_heads=3, attention_head_dim=64, num_layers=6, ffn_dim=384, text_dim=128
    ),
    vae=vae_config(),
)
TINY = Architecture(
    text_encoder=TextEncoderConfig(vocab_size=512, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
    transformer=TransformerConfig(num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=32, text_dim=32),
    vae=vae_config(base_dim=4, dim_mult=(1, 1, 1, 1)),
)
"""For tests and dry runs on a CPU."""


@dataclasses.dataclass
class Networks:
    """The modules of one revision."""

    text_encoder: UMT5EncoderModel
    transformer: WanTransformer
    vae: WanVae

    def to(self, device: torch.device | str) -> Networks:
        """Move all three in place."""
        for module in (self.text_encoder, self.transformer, self.vae):
            module.to(device)
        return self


def build(architecture: Architecture) -> Networks:
    """Freshly initialised networks on the CPU, in float32."""
    text_encoder = UMT5EncoderModel(text_encoder_config(architecture.text_encoder))
    transformer = WanTransformer(architecture.transformer)
    for block in transformer.blocks:
        nn.init.zeros_(block.attn1.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.ffn.net[2].weight)
        nn.init.normal_(block.scale_shift_table, std=0.02)
    nn.init.zeros_(transformer.proj_out.weight)
    return Networks(text_encoder, transformer, WanVae(architecture.vae))


def text_encoder_config(config: TextEncoderConfig) -> UMT5Config:
    """What transformers needs to build the encoder; no dropout."""
    fields = {field: getattr(config, field) for field in config.__struct_fields__}
    return UMT5Config(**fields, feed_forward_proj="gated-gelu", dropout_rate=0.0, architectures=["UMT5EncoderModel"],
                      pad_token_id=PAD_ID, eos_token_id=1, use_cache=False)  # fmt: skip


def encode_text(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Token ids [B, N] padded with 0 -> prompt rows [B, N, d_model], zero where padded.

    The mask is given as the additive one that the encoder would make itself, without asking the GPU about its content.
    """
    real = ids != PAD_ID
    mask = torch.where(real, 0.0, torch.finfo(torch.float32).min)[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    rows = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return rows * real.unsqueeze(-1)


def prompt_embeds(encoder: UMT5EncoderModel, ids: Tensor, text_len: int = 512) -> Tensor:
    """What the engine gives the transformer: `encode_text` padded with zero rows to [B, text_len, d_model]."""
    rows = encode_text(encoder, ids)
    return F.pad(rows, (0, 0, 0, text_len - rows.shape[1]))


def training_velocity(
    transformer: WanTransformer,
    latents: Tensor,
    timestep: Tensor,
    rows: Tensor,
    rope: Tensor,
    run_block: RunBlock | None = None,
) -> Tensor:
    """`transformer.forward` for prompt rows [B, N, text_dim] of which the rest up to `text_len` are zero.

    All those zero rows have the same key and value, so one of them with log(text_len - N) added to its score has the
    same share of the softmax as all of them: exact, and cross-attention over N+1 rows instead of 512. `run_block` is
    `training_block` or a compiled version of it.
    """
    text_len = transformer.config.text_len
    text = transformer.condition_embedder.text_embedder(F.pad(rows, (0, 0, 0, 1)).to(transformer.dtype))
    bias = torch.zeros(text.shape[1], device=text.device)
    bias[-1].fill_(math.log(text_len - rows.shape[1]))
    x = transformer._patchify(latents)
    time, modulation = transformer.condition_embedder.embed_time(timestep)
    for block in transformer.blocks:
        x = (run_block or training_block)(block, x, modulation, text, bias, rope)
    return transformer._unpatchify(transformer._head(Stream(x), time), transformer._grid(*latents.shape[2:]))


def training_block(block: Block, x: Tensor, modulation: Tensor, text: Tensor, bias: Tensor, rope: Tensor) -> Tensor:
    """`Block.forward` with keys and values made from `text` [B, N+1, dim] and `bias` [N+1] added to the scores."""
    table = block.scale_shift_table + modulation
    shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)
    x = x + gate1 * block.attn1(modulate(x, shift1, scale1, block.eps), rope, Compute())
    k, v = block.attn2.keys_values(text)
    query = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.eps)
    x = x + _biased_attention(block, query, k, v, bias)
    return x + gate2 * block.ffn(modulate(x, shift2, scale2, block.eps))


def _biased_attention(block: Block, x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    attn = block.attn2
    q = attn.split(F.rms_norm(attn.to_q(x), x.shape[-1:], attn.norm_q.weight, attn.norm_q.eps))
    q, k, v = (tensor.transpose(1, 2).to(v.dtype) for tensor in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5 + bias
    y = scores.softmax(dim=-1).to(v.dtype) @ v
    return attn.to_out[0](y.transpose(1, 2).flatten(2))
