"""The weights that are in memory, held by the supervisor so that they outlive the stage processes."""

from __future__ import annotations

import os
from collections.abc import Collection

from ipc.messages import Holding, WeightVersion
from ipc.payload import place_name


class WeightStore:
    """Placed components by device and name: the processes of one device share what is placed there.

    Resource handling: owns one descriptor per component and device until it is replaced or `close`; the memory is free
    when that and every mapping of it are gone.
    """

    def __init__(self) -> None:
        self._placed: dict[tuple[str, str], tuple[WeightVersion, int]] = {}

    def keep(self, device: str, version: WeightVersion, fd: int) -> None:
        """Take over the descriptor of a component; one that was kept before for this device is let go."""
        if (old := self._placed.pop((device, version.component), None)) is not None:
            os.close(old[1])
        self._placed[device, version.component] = (version, fd)

    def of(self, device: str, components: Collection[str]) -> list[tuple[WeightVersion, int]]:
        """Those of these components that are placed on a device; the descriptors stay owned by this object."""
        return [placed for (where, name), placed in self._placed.items() if where == device and name in components]

    def versions(self) -> list[WeightVersion]:
        return [version for version, _ in self._placed.values()]

    def holdings(self) -> list[Holding]:
        return [
            Holding(
                name=version.component, where=place_name(version.device), state="placed", bytes=version.bytes,
                generation=version.content,
            )
            for version in self.versions()
        ]  # fmt: skip

    def close(self) -> None:
        while self._placed:
            _, (_, fd) = self._placed.popitem()
            os.close(fd)
