"""The simulated exchange as a service on a fixed port, with a position in a hundred symbols."""

import asyncio
import os

from governor.sim.exchange import ExchangeSim

PORT = 8090
SYMBOLS = tuple(f"T{number:02}USDT" for number in range(100))


async def serve() -> None:
    """Serve until killed."""
    exchange = ExchangeSim(api_key=os.environ["API_KEY"], api_secret=os.environ["API_SECRET"])
    for symbol in SYMBOLS:
        exchange.set_price(symbol, "100")
        exchange.set_position(symbol, "4")
    server = await asyncio.start_server(exchange._accept, "127.0.0.1", PORT)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
