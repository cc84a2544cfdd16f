"""The feed-forward of a transformer block, and of the embedding of image tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.messages.names import KernelKind
from stages.kernels import linear_gelu


class FeedForward(nn.Module):
    """Linear, GELU, Linear; the nesting gives Diffusers' names `net.0.proj` and `net.2`."""

    def __init__(self, width_in: int, hidden: int, width: int, gelu: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.gelu = gelu
        self.net = nn.ModuleList(
            [nn.ModuleDict({"proj": nn.Linear(width_in, hidden)}), nn.Identity(), nn.Linear(hidden, width)]
        )

    @property
    def _linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.net[0]["proj"], self.net[2]  # type: ignore[index, return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._linears[0].weight.dtype

    def forward(self, x: Tensor, kernels: KernelKind = "torch") -> Tensor:
        """[B, L, width_in] -> [B, L, width]."""
        return self.narrow(self.widen(x, kernels))

    def widen(self, x: Tensor, kernels: KernelKind = "torch") -> Tensor:
        """The first linear and GELU: [B, L, width_in] -> [B, L, hidden]."""
        up, _ = self._linears
        if self.gelu == "tanh":
            return linear_gelu(kernels, x, up.weight, up.bias)
        return F.gelu(up(x))

    def narrow(self, hidden: Tensor) -> Tensor:
        """The second linear: [B, L, hidden] -> [B, L, width]."""
        _, down = self._linears
        return down(hidden)
