"""A balancer of TCP connections: the server with the fewest of them comes first, with checks of health."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from types import TracebackType

CHECKING = 0.2  # seconds between checks of a server


class Balancer:
    """Listens on a free port of this machine; each connection goes to the healthy target that has the fewest.

    A connection stays where it is. If its target is gone, it ends. taken: by target, the connections that it got.
    """

    def __init__(self, *targets: str) -> None:
        self.taken = dict.fromkeys(targets, 0)
        self._open, self._healthy = dict.fromkeys(targets, 0), set(targets)
        self._writers = set[asyncio.StreamWriter]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address: str = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._checks = [asyncio.create_task(self._check(target)) for target in self.taken]
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = target.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        self._writers.add(writer)
        return reader, writer

    async def _check(self, target: str) -> None:
        while True:
            try:
                _, writer = await self._connect(target)
                self._close(writer)
                self._healthy.add(target)
            except OSError:
                self._healthy.discard(target)
            await asyncio.sleep(CHECKING)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        while self._healthy:
            target = min(sorted(self._healthy), key=self._open.__getitem__)
            try:
                far_reader, far_writer = await self._connect(target)
            except OSError:
                self._healthy.discard(target)
                continue
            self._open[target] += 1
            self.taken[target] += 1
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            self._open[target] -= 1
            return
        self._close(writer)

    def _close(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        self._close(sink)

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # they are closed in the loop's next round

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Balancer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
