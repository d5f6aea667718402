"""Fixtures every test may use: `server` is one running server of each kind, `flushed` the same emptied."""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis
import redis.asyncio

from tests.servers import KINDS, Kind, RedisServer, ServerUnavailable

NewServer = Callable[..., RedisServer]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", metavar="FILE", help="Write what was measured under systemd there, as a table.")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tell what tests have measured: their properties named `seconds: …`."""
    measured: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in report.user_properties if getattr(report, "when", "") == "teardown" else ():
                if name.startswith("seconds: "):
                    measured.setdefault(name.removeprefix("seconds: "), []).append(value)
    if not measured:
        return
    rows = [
        f"| {name} | {statistics.median(found):.3f} | {max(found):.3f} | {len(found)} |"
        for name, found in measured.items()
    ]
    table = "\n".join(["| seconds | median | most | of |", "|---|---|---|---|", *rows])
    terminalreporter.section("measured")
    terminalreporter.write_line(table)
    if config.getoption("--figures"):
        Path(config.getoption("--figures")).write_text(f"{table}\n")


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
def client(flushed: RedisServer) -> Iterator[redis.Redis]:
    """Yield a client of the shared server, emptied."""
    with flushed.client() as one:
        yield one


@pytest.fixture
def new_server() -> Iterator[NewServer]:
    """Yield a way to start servers of the test's own: `new_server("redis7", appendonly=True)`."""
    with contextlib.ExitStack() as stack:
        yield lambda kind="valkey", **options: stack.enter_context(build(kind, **options))


@pytest.fixture(params=KINDS)
def own_server(request: pytest.FixtureRequest, new_server: NewServer) -> RedisServer:
    """Return a server of each kind that only this test uses."""
    return new_server(request.param)
