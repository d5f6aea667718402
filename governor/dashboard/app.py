"""The routes."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from governor.dashboard.board import Board
from governor.dashboard.streams import Client, Hub, message

STATIC = Path(__file__).parent / "static"


class Pages:
    """What answers without a login: the page, and what it shows."""

    def __init__(self, board: Board, hub: Hub) -> None:
        self.board, self.hub = board, hub

    def routes(self) -> list[Route | Mount]:
        """All of them."""
        return [
            Route("/", self.index),
            Route("/healthz", self.healthy),
            Route("/api/snapshot", self.snapshot),
            Route("/api/stream", Stream(self.board, self.hub)),
            Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        ]

    async def index(self, _request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    async def healthy(self, _request: Request) -> Response:
        return JSONResponse({"loop": "alive", "clients": len(self.hub.clients)})

    async def snapshot(self, _request: Request) -> Response:
        return json(self.board.snapshot(logged_in=False))


class Stream:
    """`/api/stream`, as ASGI: it has to notice a client that goes, and one that does not read."""

    def __init__(self, board: Board, hub: Hub) -> None:
        self._board, self._hub = board, hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._hub.full:
            await error("too many open streams", 503)(scope, receive, send)
            return
        client = Client(scope["state"]["abort"], lambda: False)
        first = lambda: message("snapshot", self._board.snapshot(logged_in=False), self._board.seq)  # noqa: E731
        await self._hub.serve(client, first, scope, receive, send)


def json(body: bytes, status: int = 200) -> Response:
    """An answer that is not kept anywhere."""
    return Response(body, status, {"Cache-Control": "no-store"}, "application/json")


def error(told: str, status: int) -> Response:
    """A refusal, in a sentence."""
    return JSONResponse({"error": told}, status, {"Cache-Control": "no-store"})


def application(board: Board, hub: Hub) -> Starlette:
    """The whole application."""
    return Starlette(routes=Pages(board, hub).routes())
