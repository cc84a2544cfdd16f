"""What the processes have mapped of the weights, and how much of them they keep on their devices.

Processes are told one by one, those included that are restarted meanwhile, until all have answered: reloads
(`engine/reload.py`), copies in host memory (`engine/host_copies.py`) and memory levels (`engine/levels.py`) are carried
out here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.plans import HOST, Plans
from engine.posts import Changes, Post, Posts
from engine.process import StageProcess
from engine.weights import Placed, WeightStore
from ipc.errors import Failure, StageFailed, from_failure
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import STAGE_OF_COMPONENT, stage_of
from ipc.messages.reports import Adopted, MemorySet
from ipc.messages.stage import Adopt, Forget

log = logging.getLogger(__name__)


class Unlocked(NamedTuple):
    """Weights in host memory whose pages could not be locked for a GPU."""

    bytes: int
    why: str
    """What the driver says, of the first."""


class Upkeep:
    """Has the processes of a crew map what they need, forget what nobody does, and keep to their device's plan."""

    def __init__(self, posts: Posts, placed: WeightStore, plans: Plans, changes: Changes, deadline: float) -> None:
        """`changes`: told whenever a process has answered, has come up or has ended; `deadline`: seconds for all
        processes of a device to change their plan."""
        self._posts, self._placed, self._plans = posts, placed, plans
        self._changes, self._deadline = changes, deadline
        self._refused: dict[tuple[str, str], Failure] = {}
        """Versions of weights that a process could not map, and why."""
        self._unfit: dict[str, Failure] = {}
        """Devices of which a process could not keep to the plan that was asked for, and why."""
        self.ended = False
        """The crew stops: nobody waits for its processes any more."""

    async def adopt(self, component: str, content: str) -> None:
        """Have every process that computes with this component map a version, wherever it is placed for its device.

        Returns when all have, those included that are restarted meanwhile; but for FAILED ones. Raises `StageFailed` if
        one refuses, or none is left.
        """
        await self._adopt(component, content, lambda post: self._placed_for(post, component, content))

    async def adopt_copy(self, component: str, content: str) -> None:
        """As `adopt`, of the copy in host memory alone."""
        copy = self._placed.find(HOST, component, content)
        assert copy is not None, f"{component} is in host memory"
        await self._adopt(component, content, lambda post: [copy])

    async def _adopt(self, component: str, content: str, wanted: Callable[[Post], list[Placed]]) -> None:
        self._refused.pop((component, content), None)

        def has(post: Post) -> bool:
            return all(post.has(component, content, placed.device) for placed in wanted(post))

        def tell(post: Post, process: StageProcess) -> None:
            for placed in wanted(post):
                self._tell_adopt(process, placed)

        def check() -> None:
            if (refused := self._refused.pop((component, content), None)) is not None:
                raise StageFailed(f"the new {component} cannot be used: {refused.message}")

        posts = self._posts.siblings(STAGE_OF_COMPONENT[component])
        await self._have_all(posts, has, tell, check, f"computes with the {component}")

    def _placed_for(self, post: Post, component: str, content: str) -> list[Placed]:
        """The places of a version that its process maps. `StageFailed` if it is not where it is computed with."""
        assert post.device is not None, f"{post.name} computes"
        places = self._plans.places(post.device)
        found = [self._placed.find(place, component, content) for place in places]
        if found[0] is None:
            raise StageFailed(
                f"the memory level of {post.device} changed while the {component} was read, which is now needed "
                "elsewhere; reload again"
            )
        return [placed for placed in found if placed is not None]

    async def _have_all(
        self,
        posts: Sequence[Post],
        done: Callable[[Post], bool],
        tell: Callable[[Post, StageProcess], None],
        check: Callable[[], None],
        what: str,
    ) -> None:
        """Tell every process at these seats for which it is not `done`, those included that are restarted meanwhile,
        and return when it is for all; FAILED ones are left out. Raises what `check` does, `StageFailed` if none is left
        that does `what`."""
        told: set[int] = set()
        while True:
            changed = self._changes.next
            check()
            if self.ended or all(post.error is not None for post in posts):
                raise StageFailed(f"no process is left that {what}")
            missing = [post for post in posts if post.error is None and not done(post)]
            if not missing:
                return
            for post in missing:
                if post.process is not None and post.state == "up" and post.process.epoch not in told:
                    told.add(post.process.epoch)
                    tell(post, post.process)
            await changed.wait()

    def forget(self, component: str, content: str) -> None:
        """Unmap a version everywhere and let go of its memory."""
        for process in self._posts.processes():
            if process.ready:
                self._tell_forget(process, component, content)
        self._placed.let_go(component, content)

    def _tell_forget(self, process: StageProcess, component: str, content: str) -> None:
        known = {key for key in process.knows if key[:2] == (component, content)}
        process.unlocked.pop((component, content), None)
        if known:
            process.knows -= known
            process.send(Forget(component=component, content=content))

    def _tell_adopt(self, process: StageProcess, placed: Placed) -> None:
        key = (placed.version.component, placed.version.content, placed.device)
        if key not in process.knows | process.asked:
            process.asked.add(key)
            process.send(Adopt(version=placed.version), [placed.fd])

    def bring_up_to_date(self, process: StageProcess) -> None:
        """A process is up, or has mapped something: have it unmap the versions that were let go of before it could be
        told, map the copies in host memory that came meanwhile, and keep to the plan that holds."""
        device = self._posts.device_of(process.seats)
        for component, content in sorted({key[:2] for key in process.knows}):
            if not self._placed.has(component, content):
                self._tell_forget(process, component, content)
        if device not in self._plans.held:
            return
        if HOST in self._plans.places(device):
            stages = [stage_of(seat) for seat in process.seats]
            for placed in self._placed:
                if placed.device == HOST and STAGE_OF_COMPONENT[placed.version.component] in stages:
                    self._tell_adopt(process, placed)
        if device not in self._plans.coming and process.memory != self._plans.held[device]:
            process.send(self._plans.order(device, self._plans.held[device]))

    def unlocked(self, device: str) -> Unlocked | None:
        """What of the weights in host memory the processes of a device could not lock; None: nothing."""
        reasons: dict[tuple[str, str], str] = {}
        for post in self._posts.on(device):
            reasons |= {} if post.process is None else post.process.unlocked
        copies = {(p.version.component, p.version.content): p.version.bytes for p in self._placed if p.device == HOST}
        size = sum(copies.get(version, 0) for version in reasons)
        return Unlocked(size, next(iter(reasons.values()))) if reasons else None

    def places_of(self, component: str) -> list[str]:
        """Where a version of it is placed: where it is computed with, and where host copies are kept."""
        posts = self._posts.siblings(STAGE_OF_COMPONENT[component])
        devices = [post.device for post in posts if post.device is not None]
        return list(dict.fromkeys(place for device in devices for place in self._plans.places(device)))

    def homes_of(self, component: str) -> set[str]:
        """Of these, those where it is computed with."""
        posts = self._posts.siblings(STAGE_OF_COMPONENT[component])
        return {self._plans.home(post.device) for post in posts if post.device is not None}

    def needs(self, component: str, place: str) -> bool:
        """It is one of these, or will be again if a change of level fails that is under way."""
        return bool(self._plans.coming) or place in self.places_of(component)

    async def set_memory(self, device: str, plan: MemoryPlan) -> None:
        """Have every process on a device keep to a plan, each from its next quantum on. For a level from 2 on, what is
        placed on the device is in host memory too.

        Raises what a process says why it cannot, or `StageFailed` if one does not answer in time: the plan before
        holds, and they are asked to return to it."""
        posts, before = self._posts.on(device), self._plans.held[device]
        self._unfit.pop(device, None)

        def tell(post: Post, process: StageProcess) -> None:
            process.send(self._plans.order(device, plan))

        def check() -> None:
            if (failure := self._unfit.pop(device, None)) is not None:
                raise from_failure(failure)

        self._plans.coming[device] = plan
        timeout = self._deadline
        try:
            async with asyncio.timeout(timeout):
                await self._have_all(posts, lambda post: post.keeps(plan), tell, check, f"computes on {device}")
        except TimeoutError as error:
            self._return_to(device, before)
            raise StageFailed(
                f"not every process on {device} has changed its memory level within {timeout:g} s: one is busy with a "
                "long quantum or does not come up; the level before holds"
            ) from error
        except BaseException:
            self._return_to(device, before)
            raise
        del self._plans.coming[device]
        self._plans.held[device] = plan

    def _return_to(self, device: str, plan: MemoryPlan) -> None:
        """Whoever was asked, answered or not."""
        del self._plans.coming[device]
        for process in {post.process for post in self._posts.on(device)} - {None}:
            assert process is not None
            if process.ready:
                process.send(self._plans.order(device, plan))

    def handle_memory_set(self, process: StageProcess, report: MemorySet) -> None:
        device = self._posts.device_of(process.seats)
        process.memory = report.plan
        if report.error is not None:
            log.warning("%s cannot change its memory level: %s", ", ".join(process.seats), report.error.message)
            self._unfit[device] = report.error
        for component, content in report.left if device != HOST else ():
            process.knows.discard((component, content, device))
            if not any(post.has(component, content, device) for post in self._posts):
                self._placed.let_go(component, content, device)
        self._changes.notify()

    def handle_adopted(self, process: StageProcess, report: Adopted) -> None:
        where = HOST if report.device is None else f"cuda:{report.device}"
        key = (report.component, report.content, where)
        process.asked.discard(key)
        if report.error is None:
            process.knows.add(key)
            self.bring_up_to_date(process)
        else:
            self._refused[report.component, report.content] = report.error
        self._changes.notify()
