"""What the process that starts Ray workers and the workers tell one another through: a process that has no torch to import."""

from __future__ import annotations

import asyncio


class Mailbox:
    """An actor between the workers and the process that started them: lines one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def send(self, kind: str, text: str) -> None:
        self._items.put_nowait((kind, text))

    async def receive(self) -> list[tuple[str, str]]:
        """What came since the last call; waits for something."""
        items = [await self._items.get()]
        while not self._items.empty():
            items.append(self._items.get_nowait())
        return items

    async def stop(self, number: int) -> None:
        if not self._stop.done():
            self._stop.set_result(number)

    async def stopped(self) -> int:
        """Waits for `stop`; returns the signal's number."""
        return await asyncio.shield(self._stop)
