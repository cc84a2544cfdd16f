"""The UMT5 text encoder of transformers: token ids -> prompt embeddings.

Source of the conventions (padding is masked, rows after the prompt are zero): the Wan2.1 repository (`modules/t5.py`).
Importing the class takes 2.6 s of the text stage's start (transformers 5.23, by any path), while the other stages load.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from ipc.architecture import TextEncoderConfig

ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""The token embedding has two names in the module; a checkpoint may have either both or the second."""


def build(config: TextEncoderConfig) -> UMT5EncoderModel:
    """The encoder of these numbers, for inference. Under `blank()` nothing is allocated."""
    numbers = {name: getattr(config, name) for name in config.__struct_fields__}
    return UMT5EncoderModel(UMT5Config(**numbers, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()


@torch.inference_mode()
def encode(encoder: UMT5EncoderModel, ids: list[int]) -> Tensor:
    """Token ids, `</s>` included -> [tokens, d_model] in the dtype of the weights.

    Only the real tokens are run: masked padding cannot change their rows.
    """
    rows: Tensor = encoder(torch.tensor([ids], device=encoder.device)).last_hidden_state
    return rows[0]
