"""The exchange simulator as a process of its own, and the bare pair of calls a look at it comes to.

python -m tests.benchmarks.exchange SECONDS SYMBOL …
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Self
from urllib.parse import urlsplit

import uvloop

from governor.sim.exchange import ExchangeSim

KEY, SECRET = "simulated-key", "simulated-secret"


async def serve(latency_s: float, symbols: Sequence[str]) -> None:
    """Until stdin is closed."""
    async with ExchangeSim(api_key=KEY, api_secret=SECRET, latency_s=latency_s) as exchange:
        for symbol in symbols:
            exchange.set_position(symbol, "1.000")
            exchange.set_price(symbol, "100.25")
        sys.stdout.write(f"{exchange.base_url}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def exchange(latency_s: float, symbols: Sequence[str]) -> Iterator[str]:
    """A running one; yields its address."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.exchange", str(latency_s), *symbols],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


class Calls:
    """The two calls a look comes to, over connections that are kept, with nothing between them and the socket."""

    def __init__(self, links: Sequence[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self._links = links

    @classmethod
    async def open(cls, base_url: str) -> Self:
        where = urlsplit(base_url)
        return cls([await asyncio.open_connection(where.hostname, where.port) for _ in range(2)])

    async def slower_ms(self, symbol: str) -> float:
        """What the slower of both took."""
        query = f"symbol={symbol}&timestamp={time.time_ns() // 1_000_000}&recvWindow=5000"
        signature = hmac.new(SECRET.encode(), query.encode(), hashlib.sha256).hexdigest()
        position = f"/fapi/v2/positionRisk?{query}&signature={signature}"
        mark = f"/fapi/v1/premiumIndex?symbol={symbol}"
        both = (self._call(number, path) for number, path in enumerate((position, mark)))
        return max(await asyncio.gather(*both))

    async def _call(self, number: int, path: str) -> float:
        reader, writer = self._links[number]
        begun = time.perf_counter()
        writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nX-MBX-APIKEY: {KEY}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        return (time.perf_counter() - begun) * 1000

    async def close(self) -> None:
        for _, writer in self._links:
            writer.close()
            await writer.wait_closed()


async def _slower(base_url: str, symbols: Sequence[str]) -> list[float]:
    calls = await Calls.open(base_url)
    try:
        await calls.slower_ms(symbols[0])
        return [await calls.slower_ms(symbol) for symbol in symbols]
    finally:
        await calls.close()


def slower_ms(base_url: str, symbols: Sequence[str]) -> list[float]:
    """What the slower of the two calls took for each symbol, one look after the other."""
    return uvloop.run(_slower(base_url, symbols))


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]), sys.argv[2:]))
