"""Fixtures every test may use: `server` is one running server of each kind, `flushed` the same emptied."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import pytest
import redis
import redis.asyncio

from tests.servers import KINDS, Kind, RedisServer, ServerUnavailable

NewServer = Callable[..., RedisServer]


def missing(reason: str) -> NoReturn:
    """Skip, or fail where nothing may be skipped (GOVERNOR_TEST_NO_SKIP=1)."""
    if os.environ.get("GOVERNOR_TEST_NO_SKIP") == "1":
        pytest.fail(f"not skipped because GOVERNOR_TEST_NO_SKIP=1: {reason}", pytrace=False)
    pytest.skip(reason)


def build(kind: Kind, **options: Any) -> RedisServer:
    try:
        return RedisServer(kind, **options)
    except ServerUnavailable as reason:
        missing(str(reason))


@pytest.fixture(scope="session")
def running_server() -> Iterator[Callable[[Kind], RedisServer]]:
    """Yield a way to get the shared server of a kind, started when first asked for."""
    started: dict[Kind, RedisServer] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: Kind) -> RedisServer:
            if kind not in started:
                started[kind] = stack.enter_context(build(kind))
            return started[kind]

        yield get


@pytest.fixture(scope="session", params=KINDS)
def server(request: pytest.FixtureRequest, running_server: Callable[[Kind], RedisServer]) -> RedisServer:
    """Return a running server of each kind, shared by all tests: do not kill it, see `new_server`."""
    return running_server(request.param)


@pytest.fixture
def flushed(server: RedisServer) -> RedisServer:
    """Return the shared server, emptied."""
    with server.client() as client:
        client.flushall()
        client.script_flush()
    return server


@pytest.fixture
def flushed_client(flushed: RedisServer) -> Iterator[redis.Redis]:
    """Yield a client of the shared server, emptied."""
    with flushed.client() as client:
        yield client


@pytest.fixture
async def flushed_async_client(flushed: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    """Yield an asyncio client of the shared server, emptied."""
    async with flushed.async_client() as client:
        yield client


@pytest.fixture
def new_server() -> Iterator[NewServer]:
    """Yield a way to start servers of the test's own: `new_server("redis7", appendonly=True)`."""
    with contextlib.ExitStack() as stack:
        yield lambda kind="valkey", **options: stack.enter_context(build(kind, **options))


@pytest.fixture(params=KINDS)
def own_server(request: pytest.FixtureRequest, new_server: NewServer) -> RedisServer:
    """Return a server of each kind that only this test uses."""
    return new_server(request.param)
