"""What a quantum leaves behind while the next one computes: its result on the way to where it is read, and its answer,
which waits for that. No torch here."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from ipc.messages.reports import AnyStageReport
from ipc.messages.status import Copied

Delivery: TypeAlias = Callable[[], Copied | None]
"""Brings a result to where it is read. Called once, by any thread; says what was copied, None if it is there already.
Raises what a quantum would."""

Answer: TypeAlias = Callable[[], AnyStageReport]
"""Does what an answer waits for; the answer, which says so if that failed."""


class Outbox:
    """Answers that wait for something, and those after them: given and sent by a thread, in their order.

    Resource handling: the thread is made for the first answer that waits, and lives as long as the process.
    Error handling: `put` and `flush` raise what an answer before has raised (`SystemExit`), and what sending it did.
    """

    def __init__(self, send: Callable[[AnyStageReport], None]) -> None:
        self._send = send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._sent: collections.deque[Future[None]] = collections.deque()

    @property
    def is_empty(self) -> bool:
        """All that was put was sent."""
        while self._sent and self._sent[0].done():
            self._sent.popleft().result()
        return not self._sent

    def put(self, answer: Answer) -> None:
        """Give and send this answer after those before it, while the caller goes on."""
        self._sent.append(self._thread.submit(lambda: self._send(answer())))

    def flush(self) -> None:
        """Return when all that was put was sent."""
        while self._sent:
            self._sent.popleft().result()
