"""One device's memory level: what is known of it, and how it is told."""

from __future__ import annotations

import asyncio
from typing import Literal

from engine.amounts import said_blocks, size
from engine.footprint import Account, Setting
from engine.monitor import Policy, Sample, Sampler
from engine.params import ModelParams
from engine.posts import Changes
from ipc.messages.memory import MemoryPlan
from ipc.messages.status import MemoryChange


class DeviceLevel:
    """One device's level."""

    def __init__(self, device: str, mode: Literal["auto", "fixed"], setting: Setting, account: Account) -> None:
        self.device, self.mode, self.setting, self.account = device, mode, setting, account
        self.turn = asyncio.Lock()
        """Of changes."""
        self.raising = False
        """A failed allocation is being answered."""
        self.looked = Changes()
        """Told of each sample."""
        self.freed = 0
        """How often memory was waited for that others had."""
        self.policy: Policy | None = None
        """Only where it may choose."""
        self.sampler: Sampler | None = None
        self.sample: Sample | None = None
        self.last: MemoryChange | None = None
        self.said_slow = False
        """The log has that pages could not be locked."""


def rung(plan: MemoryPlan, model: ModelParams) -> int:
    """A number that is the higher, the less a plan leaves on the device: for the scheduler."""
    return plan.level if plan.level < 3 else 3 + model.transformer.num_layers - (plan.blocks or 0)


def named(plan: MemoryPlan) -> str:
    """2, or 3 (12 blocks)."""
    return f"{plan.level}" if plan.level < 3 else f"{plan.level} ({said_blocks(plan.blocks or 0)})"


def reason(sample: Sample | None, budget: int | None) -> str:
    """What was seen, for people."""
    if sample is None:
        return "nothing is known of the GPU"
    known = [
        f"{size(amount)} {what}"
        for amount, what in ((sample.others, "of the GPU are others'"), (sample.free, "free"), (budget, "the budget"))
        if amount is not None
    ]
    return ", ".join(known)
