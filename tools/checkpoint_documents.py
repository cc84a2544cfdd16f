"""The JSON files of checkpoints: what Diffusers, transformers and the Wan repositories put beside the weights."""

from __future__ import annotations

import msgspec

from engine.params import ModelParams
from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig

DIFFUSERS_VERSION = "0.42.1"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def model_index(model: ModelParams) -> dict[str, object]:
    """`model_index.json`: which class of which library each directory is for."""
    image_to_video = model.conditioning == "channels"
    clip = model.image_encoder is not None
    document: dict[str, object] = {
        "_class_name": "WanImageToVideoPipeline" if image_to_video else "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": model.boundary,
        "expand_timesteps": model.conditioning == "first_frame",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None] if model.boundary is None else ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if image_to_video:
        document["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else [None, None]
        document["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    return document


def scheduler(flow_shift: float) -> dict[str, object]:
    """`scheduler_config.json` of UniPCMultistepScheduler."""
    return {
        "_class_name": "UniPCMultistepScheduler", "_diffusers_version": DIFFUSERS_VERSION, "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "disable_corrector": [], "dynamic_thresholding_ratio": 0.995,
        "final_sigmas_type": "zero", "flow_shift": flow_shift, "lower_order_final": True, "num_train_timesteps": 1000,
        "predict_x0": True, "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0, "solver_order": 2, "solver_p": None, "solver_type": "bh2", "steps_offset": 0,
        "thresholding": False, "timestep_spacing": "linspace", "trained_betas": None, "use_beta_sigmas": False,
        "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False,
    }  # fmt: skip


def transformer(config: TransformerConfig) -> dict[str, object]:
    """`config.json` of WanTransformer3DModel."""
    values = msgspec.to_builtins(config)
    del values["text_len"]
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": DIFFUSERS_VERSION, **values,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim, "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip


def vae(config: VaeConfig) -> dict[str, object]:
    """`config.json` of AutoencoderKLWan."""
    values = msgspec.to_builtins(config)
    values["temperal_downsample"] = values.pop("temporal_downsample")
    patch = config.patch_size if config.patch_size > 1 else None
    pixels = 3 * config.patch_size**2
    return {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": DIFFUSERS_VERSION, **values, "attn_scales": [],
        "dropout": 0.0, "in_channels": pixels, "out_channels": pixels, "patch_size": patch,
        "scale_factor_temporal": config.temporal_stride, "scale_factor_spatial": config.spatial_stride,
    }  # fmt: skip


def text_encoder(config: TextEncoderConfig) -> dict[str, object]:
    """`config.json` of UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", **msgspec.to_builtins(config),
        "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "is_gated_act": True, "pad_token_id": 0,
        "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer",
    }  # fmt: skip


def image_encoder(config: ImageEncoderConfig) -> dict[str, object]:
    """`config.json` of CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **msgspec.to_builtins(config),
        "attention_dropout": 0.0, "hidden_act": "gelu", "num_channels": 3, "projection_dim": 1024,
    }  # fmt: skip


def image_processor(config: ImageEncoderConfig) -> dict[str, object]:
    """`preprocessor_config.json` of CLIPImageProcessor."""
    side = config.image_size
    return {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor", "image_std": CLIP_STD, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": side},
    }  # fmt: skip


def original_config(model: ModelParams) -> dict[str, object]:
    """`config.json` of a transformer in the Wan repositories."""
    config = model.transformer
    kinds = {"none": "t2v", "channels": "i2v", "first_frame": "ti2v"}
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": config.dim, "eps": config.eps,
        "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "in_dim": config.in_channels,
        "model_type": kinds[model.conditioning], "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers, "out_dim": config.out_channels, "text_len": config.text_len,
    }  # fmt: skip
