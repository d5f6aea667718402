"""The routes, and what stands in front of them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import redis.asyncio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from events.codec import decode, dumps
from events.reading import pages
from events.store import EventStore, StoreError, UnavailableError
from governor.connection import store_on, stream_on
from governor.dashboard.board import Board
from governor.dashboard.control import Control
from governor.dashboard.guard import Guard, error, hosts_of
from governor.dashboard.streams import Client, Hub, message
from governor.explain import Explainer
from governor.logs import Logger
from governor.settings import Settings
from governor.telling import lines

log = Logger("governor.dashboard")

STATIC = Path(__file__).parent / "static"
EXPLAINED = 2
"""Plans explained at once: each reads the whole history."""
EXPLAIN_S = 60.0
PLAN_ID = 512
"""Characters of a plan_id; longer ones are in no event."""


class Pages:
    """What answers without a login: the page, and what it shows."""

    def __init__(
        self, settings: Settings, client: redis.asyncio.Redis, board: Board, hub: Hub, control: Control
    ) -> None:
        self._settings, self._client = settings, client
        self._board, self._hub, self._control = board, hub, control
        self._explaining = 0

    def routes(self) -> list[Route | Mount]:
        """All of them."""
        return [
            Route("/", self.index),
            Route("/healthz", self.healthy),
            Route("/api/snapshot", self.snapshot),
            Route("/api/stream", Stream(self._board, self._hub, self._control), methods=["GET"]),
            Route("/api/plans/{plan_id:path}", self.plan),
            Mount("/static", Static(directory=STATIC, check_dir=False)),
        ]

    async def index(self, _request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    async def healthy(self, _request: Request) -> Response:
        return _json(dumps({"loop": "alive", "streams": len(self._hub.clients), "cut_off": self._hub.cut_off}))

    async def snapshot(self, request: Request) -> Response:
        return _json(self._board.snapshot(logged_in=self._control.logged_in(request)))

    async def plan(self, request: Request) -> Response:
        """What `governor explain --json` prints, and its lines for a person as `lines`."""
        if self._explaining >= EXPLAINED:
            return error("other plans are being explained, try again", 503, **{"Retry-After": "1"})
        self._explaining += 1
        try:
            async with asyncio.timeout(EXPLAIN_S):
                return await self._explained(request.path_params["plan_id"])
        except TimeoutError:
            return error("the history is too long to explain a plan here: use governor explain", 503)
        except (StoreError, ValueError) as problem:
            return error(f"the events cannot be read: {problem}", 503)
        finally:
            self._explaining -= 1

    async def _explained(self, plan_id: str) -> Response:
        if len(plan_id) > PLAN_ID:
            return error(f"a plan_id has at most {PLAN_ID} characters", 404)
        state = self._board.feed.before(plan_id)
        explainer = Explainer(plan_id, state=state)
        store = await _history(self._client, self._settings)
        async with contextlib.aclosing(pages(store, 0 if state is None else state.seq)) as read:
            async for entries in read:
                for entry in entries:
                    if explainer.wants(entry):
                        explainer.feed(decode(entry))
        told = explainer.finish()
        if not told["known"]:
            return error("\n".join(lines(told)), 404)
        return _json(dumps(told | {"lines": lines(told)}))


async def _history(client: redis.asyncio.Redis, settings: Settings) -> EventStore:
    """The events with the archive before them, where it can be read; else as far back as Redis has them."""
    whole = store_on(client, settings)
    try:
        await whole.read(0, limit=1)
    except UnavailableError:
        raise
    except (StoreError, OSError):
        return stream_on(client, settings)
    return whole


class Static(StaticFiles):
    """Files of the page. They may be kept, and are asked about each time: a new version shows at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


class Stream:
    """`/api/stream`, as ASGI: it has to notice a client that goes, and one that does not read."""

    def __init__(self, board: Board, hub: Hub, control: Control) -> None:
        self._board, self._hub, self._control = board, hub, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._hub.full:
            await error("too many open streams", 503, **{"Retry-After": "5"})(scope, receive, send)
            return
        request = Request(scope)
        client = Client(scope["state"]["abort"], lambda: self._control.logged_in(request))

        def first() -> bytes:
            return message("snapshot", self._board.snapshot(logged_in=client.logged_in()), self._board.seq)

        await self._hub.serve(client, first, scope, receive, send)


def application(settings: Settings, client: redis.asyncio.Redis, board: Board, hub: Hub, control: Control) -> Guard:
    """The whole application.

    Args:
        settings: of the governor that is looked at.
        client: Redis, to explain plans from.
        board: what is shown.
        hub: who watches.
        control: who may act.
    """
    routes = [*Pages(settings, client, board, hub, control).routes(), *control.routes()]
    handlers: Any = {HTTPException: _told, Exception: _failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts=hosts_of(settings))


def _told(_request: Request, problem: HTTPException) -> Response:
    return error(str(problem.detail), problem.status_code, **(problem.headers or {}))


def _failed(_request: Request, problem: Exception) -> Response:
    return error(f"it failed: {type(problem).__name__}", 500)


def _json(body: bytes) -> Response:
    return Response(body, 200, {"Cache-Control": "no-store"}, "application/json")
