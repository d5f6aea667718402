"""The routes that change something: log in, disarm, re-arm. Without a token each of them answers 403."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from events.chain import GENESIS
from events.codec import dumps
from events.store import StoreError, Write
from events.types import Rearmed
from governor import by_hand, decider
from governor.connection import connected, ledger_on, now, stream_on
from governor.dashboard.board import Board
from governor.dashboard.feed import Feed
from governor.dashboard.guard import address, error, foreign
from governor.dashboard.login import SESSION_S, Failures, Sessions
from governor.disarming import in_thread
from governor.logs import Logger
from governor.settings import Settings
from governor.telling import clean, moment
from projections.state import State

log = Logger("governor.dashboard")

BODY = 16_384
BODY_S = 5.0
REASON = 500
WORD = "rearm"
"""What has to be typed to re-arm."""
ACTIONS = 8
"""Disarms and re-arms under way at once; more are refused,"""
REARMS = 4
"""and so are re-arms where so many are: a disarm never waits for them."""
LOOK_S = 1.0
"""Redis has this long to say whether there are events, before a disarm goes on."""
OFF = "control is off: DASHBOARD_TOKEN_FILE is not set"

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class _Login(msgspec.Struct):
    token: str


class _Disarm(msgspec.Struct):
    reason: str


class _Rearm(msgspec.Struct):
    reason: str
    typed: str


class Control:
    """Who is logged in, and what they may do.

    Args:
        settings: as the commands have them.
        feed: the state that is shown.
        board: tells whether somebody is logged in.
        sessions: None: nobody can log in, and nothing can be changed.
        failures: of logins.
    """

    def __init__(
        self, settings: Settings, feed: Feed, board: Board, sessions: Sessions | None, failures: Failures
    ) -> None:
        self._settings, self._feed, self._board = settings, feed, board
        self._sessions, self._failures = sessions, failures
        self._proxy = settings.dashboard_behind_proxy
        self._actions = 0

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/api/login", self._changes(self.login, public=True), methods=["POST"]),
            Route("/api/logout", self._changes(self.logout, public=True), methods=["POST"]),
            Route("/api/disarm", self._changes(self.disarm), methods=["POST"]),
            Route("/api/rearm", self._changes(self.rearm), methods=["POST"]),
            Route("/api/rearm", self.preview, methods=["GET"]),
        ]

    def logged_in(self, request: Request) -> bool:
        """Whether a request comes with a session that has not ended."""
        return self._sessions is not None and self._sessions.valid(request.cookies.get(self._cookie(request)))

    def _changes(self, handler: Handler, *, public: bool = False) -> Handler:
        async def guarded(request: Request) -> Response:
            if self._sessions is None:
                return error(OFF, 403)
            if (why := foreign(request, behind_proxy=self._proxy)) is not None:
                return error(f"refused: {why}", 403)
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return error("expected Content-Type: application/json", 415)
            if not public and not self.logged_in(request):
                return error("log in first", 401)
            return await handler(request)

        return guarded

    def _secure(self, request: Request) -> bool:
        return self._proxy or request.url.scheme == "https"

    def _cookie(self, request: Request) -> str:
        # Browsers keep one jar for all ports of a name, and several accounts have their dashboards on loopback.
        port = request.url.port or 80
        return "__Host-governor" if self._secure(request) else f"governor-{port}"

    # ---------------------------------------------------------------------------------------------------- sessions

    async def login(self, request: Request) -> Response:
        assert self._sessions is not None
        given = await body_of(request, _Login)
        if isinstance(given, Response):
            return given
        who = address(request, behind_proxy=self._proxy)
        if (wait_s := self._failures.wait_s(who)) > 0:
            told = {"error": f"too many wrong tokens, wait {wait_s} s", "retry_after_s": wait_s}
            return _answer(told, 429, {"Retry-After": str(wait_s)})
        session = self._sessions.login(given.token)
        if session is None:
            self._failures.note(who)
            log.warning("a login failed", address=who)
            return error("that is not the token", 401)
        log.info("logged in", address=who)
        answer = self._told(logged_in=True)
        answer.set_cookie(
            self._cookie(request),
            session,
            max_age=int(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=self._secure(request),
        )
        return answer

    async def logout(self, request: Request) -> Response:
        assert self._sessions is not None
        name = self._cookie(request)
        self._sessions.logout(request.cookies.get(name))
        answer = self._told(logged_in=False)
        answer.delete_cookie(name, httponly=True, samesite="strict", secure=self._secure(request))
        return answer

    def _told(self, *, logged_in: bool) -> Response:
        return _answer({"control": msgspec.Raw(self._board.control(logged_in=logged_in))})

    # ----------------------------------------------------------------------------------------------------- actions

    async def disarm(self, request: Request) -> Response:
        given = await body_of(request, _Disarm)
        if isinstance(given, Response):
            return given
        reason = given.reason.strip()[:REASON]
        if not reason:
            return error("say why; it is recorded", 400)
        operator = self._operator(request)
        log.warning("disarm asked for", operator=operator, reason=reason)
        return await self._carry_out(lambda: stop(self._settings, reason=reason, operator=operator))

    async def preview(self, request: Request) -> Response:
        """`GET /api/rearm`: what a re-arm would do now."""
        if self._sessions is None:
            return error(OFF, 403)
        if not self.logged_in(request):
            return error("log in first", 401)
        refusal = refusal_of(self._feed)
        says = [] if self._feed.state is None else consequences(self._feed.state, self._settings)
        return _answer({"allowed": refusal is None, "refusal": refusal, "says": says, "type": WORD})

    async def rearm(self, request: Request) -> Response:
        given = await body_of(request, _Rearm)
        if isinstance(given, Response):
            return given
        reason = given.reason.strip()[:REASON]
        if not reason:
            return error("say why; it is recorded", 400)
        if given.typed.strip() != WORD:
            return error(f"type {WORD}", 400)
        if (refusal := refusal_of(self._feed)) is not None:
            return error(f"refused: {refusal}", 409)
        operator = self._operator(request)
        log.warning("re-arm asked for", operator=operator, reason=reason)
        work = partial(by_hand.rearm, self._settings, reason=reason, operator=operator, force=False, restore=False)
        return await self._carry_out(work, refused=409, most=REARMS)

    def _operator(self, request: Request) -> str:
        return f"dashboard:{address(request, behind_proxy=self._proxy)}"

    async def _carry_out(
        self, work: Callable[[], Coroutine[Any, Any, dict[str, Any]]], *, refused: int = 200, most: int = ACTIONS
    ) -> Response:
        """Do it in a thread and a loop of its own: the feed goes on, and it does not end with the request."""
        if self._actions >= most:
            return error("too much is under way already", 503)
        self._actions += 1
        try:
            told = await asyncio.shield(in_thread(lambda: asyncio.run(work())))
        except StoreError as problem:
            return error(f"Redis is not reachable: {problem}", 503)
        except Exception as problem:
            log.exception("what a person asked for failed")
            return error(f"it failed: {str(problem) or type(problem).__name__}", 500)
        finally:
            self._actions -= 1
        log.info("what a person asked for is done", code=told["code"], message=told["message"])
        if told["code"] and refused != 200:
            return error(told["message"], refused)
        return _answer(told)


async def stop(settings: Settings, *, reason: str, operator: str) -> dict[str, Any]:
    """Disarm. Whether there are events is looked at now: what is shown may be from before Redis lost them.

    Returns:
        What to tell, as `by_hand.disarm` does.

    Raises:
        StoreError: Redis is not reachable any more.
    """
    try:
        async with connected(settings, answer_s=LOOK_S) as client:
            empty = await stream_on(client, settings).head() == GENESIS
    except StoreError:
        empty = False  # it knows what to do without Redis
    act = brake if empty else by_hand.disarm
    return await act(settings, reason=reason, operator=operator)


async def brake(settings: Settings, *, reason: str, operator: str) -> dict[str, Any]:
    """Stop where there are no events: whoever wrote one would begin a history beside the one the daemon writes back.

    Returns:
        What to tell, as `by_hand.disarm` does.

    Raises:
        StoreError: Redis is not reachable.
    """
    async with connected(settings, answer_s=by_hand.REDIS_S) as client:
        ledger = ledger_on(client, settings)
        value = dumps({"operator": operator, "reason": reason, "noted_us": now()})
        await ledger.store.write([Write("set", ledger.keys.halt, (value,))])
    return {
        "state": None, "epoch": None, "reason": reason, "operator": operator, "done": False, "code": 1,
        "message": "There is no event: the emergency brake is set, nothing is permitted. The daemon disarms when it "
        "has written its events back; until then the Apply Layer is as it was.",
    }  # fmt: skip


def refusal_of(feed: Feed) -> str | None:
    """Why a re-arm would be refused now; None where nothing is known against it."""
    state = feed.state
    if feed.error is not None or state is None:
        return f"what is shown is not up to date: {feed.error}"
    if not state.seq:
        return "there is no event: no daemon has ever run here"
    try:
        found = decider.rearm(state, reason="", operator="", force=False, halt=feed.halted is not None)
    except decider.RearmRefusedError as refused:
        return str(refused)
    if not found and feed.halted is not None:
        return (
            f"the state is {state.mode.state}, and the emergency brake is set: the daemon makes it a disarm, to be "
            "re-armed from. Without a daemon, delete its key (governor:halt)"
        )
    return None if found else f"the state is {state.mode.state}: there is nothing to re-arm"


def consequences(state: State, settings: Settings) -> list[str]:
    """What a re-arm does, and what it does not, in sentences."""
    mode, disarm = state.mode, state.mode.disarm
    told = []
    if disarm is not None:
        by = f" by {clean(disarm.operator)}" if disarm.operator else ""
        told.append(f"It was disarmed at {moment(disarm.at / 1e6)}{by}: {clean(disarm.reason)}.")
    told.append(f"{Rearmed.NAME} is recorded with your reason and begins epoch {mode.epoch + 1}.")
    told.append("From that moment on plans get permits again. Windows and totals stay as they are, errors begin at 0.")
    file = settings.apply_config_path
    if mode.drift is not None:
        told.append(
            f"BUT {file} was set to APPLY_MODE={clean(mode.drift)} by hand: it trades as soon as there are permits. "
            "This page never changes it."
        )
        return told
    told.append(
        f"The Apply Layer stays as the disarm left it: {file} says dry run. This page never changes it; a person who "
        "may write it does, with: sudo governor rearm --reason ... --restore"
    )
    return told


async def body_of(request: Request, kind: type[T]) -> T | Response:
    """A request's JSON as `kind`, or what is wrong with it."""
    data = b""
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > BODY:
                    return error(f"more than {BODY} bytes", 413)
        return msgspec.json.decode(data, type=kind)
    except TimeoutError:
        return error("the request did not come to an end", 408)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        return error(f"the request cannot be read: {problem}", 400)


def _answer(told: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(told), status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")
