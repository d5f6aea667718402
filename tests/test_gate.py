import asyncio
import json
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import FrozenInstanceError, asdict
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import fakeredis
import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, ResponseError
from redis.retry import Retry

from governor.gate import AsyncPermitGate, Permit, PermitDenied, PermitGate
from tests.servers import KINDS, Kind, RedisServer

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors" / "permits.json").read_text("utf-8"))
ERRORS = [
    redis.ConnectionError("Connection refused"),
    redis.TimeoutError("Timeout reading from socket"),
    ResponseError("OOM command not allowed"),
    AuthenticationError("invalid username-password pair"),
    NoScriptError("No matching script. Please use EVAL."),
    TypeError("'NoneType' object is not subscriptable"),
    AttributeError("'NoneType' object has no attribute 'read'"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    OSError("Bad file descriptor"),
    TimeoutError(),
]
REPLIES: list[object] = [
    None,
    "OK",
    1,
    b"granted",
    [],
    [b"granted"],
    [b"granted", None],
    [b"granted", b"{}", b"more"],
    [b"maybe", b"no_permit"],
    [None, b"no_permit"],
    {b"granted": b"{}"},
]


# ---------------------------------------------------------------- where the tests run


class Place:
    """Somewhere permits are kept, empty, with clients of every make."""

    def __init__(self, server: RedisServer | None) -> None:
        self._server = server
        self._fake = None if server else fakeredis.FakeServer()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.redis = self.client()
        self.redis.flushall()
        self.redis.script_flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self, *, decode_responses: bool = True, protocol: int = 2) -> redis.Redis:
        if self._server is not None:
            make = self._server.client(decode_responses=decode_responses, protocol=protocol)
            return self._stack.enter_context(make)
        fake: redis.Redis = fakeredis.FakeRedis(server=self._fake, decode_responses=decode_responses, protocol=protocol)
        self._stack.callback(fake.close)
        return fake

    def async_client(self, *, decode_responses: bool = True, protocol: int = 2) -> redis.asyncio.Redis:
        if self._server is not None:
            return self._server.async_client(decode_responses=decode_responses, protocol=protocol)
        fake: redis.asyncio.Redis = fakeredis.FakeAsyncRedis(
            server=self._fake, decode_responses=decode_responses, protocol=protocol
        )
        return fake

    def now(self) -> int:
        return int(self.redis.time()[0])

    def arm(self, epoch: int = 7) -> None:
        self.redis.set("quantum:governor:state", json.dumps({"state": "ARMED", "epoch": epoch}))

    def grant(self, plan_id: str = "plan-1", **fields: object) -> None:
        self.redis.set(f"quantum:permit:{plan_id}", permit_json(self.now(), plan_id=plan_id, **fields))

    def has(self, plan_id: str = "plan-1") -> bool:
        return bool(self.redis.exists(f"quantum:permit:{plan_id}"))


def permit_json(now: float, **fields: object) -> str:
    permit = {
        "granted": True,
        "symbol": "BTCUSDT",
        "decision": "EXECUTE",
        "computed_qty": 0.015,
        "computed_notional": 1425.5,
        "created_at": now,
        "consumed": False,
        "plan_id": "plan-1",
        "expires_at": now + 60,
        "epoch": 7,
        "seq": 42,
    }
    return json.dumps(permit | fields)


@pytest.fixture(params=["fakeredis", *KINDS])
def place(request: pytest.FixtureRequest, running_server: Callable[[Kind], RedisServer]) -> Iterator[Place]:
    with Place(None if request.param == "fakeredis" else running_server(request.param)) as ready:
        yield ready


@pytest.fixture
def armed(place: Place) -> Place:
    place.arm()
    return place


@pytest.fixture(params=KINDS)
def real(request: pytest.FixtureRequest, running_server: Callable[[Kind], RedisServer]) -> Iterator[Place]:
    """A place on a real server: for races and broken connections."""
    with Place(running_server(request.param)) as ready:
        ready.arm()
        yield ready


@pytest.fixture
async def both(place: Place) -> AsyncIterator[list[Callable[..., Any]]]:
    """The synchronous and the asyncio `consume`, each to be awaited."""
    async with place.async_client() as client:
        gate, async_gate = PermitGate(place.redis), AsyncPermitGate(client)

        async def consume(*args: Any, **kwargs: Any) -> Permit:
            return gate.consume(*args, **kwargs)

        yield [consume, async_gate.consume]


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(PermitDenied) as denied:
        call()
    assert denied.value.code == "missing_permit_or_redis"
    return denied.value.reason


# ---------------------------------------------------------------- the vectors


def at(now: int, text: str) -> str:
    """Replace `$now+59` by the number, as the vectors' README says."""
    return re.sub(r"\$now([+-][\d.]+)?", lambda found: str(now + Decimal(found[1] or 0)), text)


def expected_permit(now: int, fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {
        "computed_qty": Decimal(fields["computed_qty"]),
        "computed_notional": Decimal(fields["computed_notional"]),
        "created_at": float(at(now, fields["created_at"])),
        "expires_at": float(at(now, fields["expires_at"])),
    }


def stored_keys(plan_id: str) -> dict[str, str]:
    plan_id = plan_id if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", plan_id) else "plan-1"
    return {
        "permit": f"quantum:permit:{plan_id}",
        "state": "quantum:governor:state",
        "block": f"quantum:governor:block:{plan_id}",
    }


def prepare(place: Place, case: dict[str, Any], now: int) -> dict[str, str]:
    names = stored_keys(case["call"]["plan_id"])
    place.redis.delete(*names.values())
    for name, raw in case["keys"].items():
        if raw is not None:
            place.redis.set(names[name], at(now, raw))
    return names


async def answer(consume: Callable[..., Any], call: dict[str, str], now: int, expect: dict[str, Any]) -> None:
    if "denied" in expect:
        with pytest.raises(PermitDenied) as denied:
            await consume(call["plan_id"], symbol=call["symbol"], wait_s=0)
        assert denied.value.reason == expect["denied"]
    else:
        permit = await consume(call["plan_id"], symbol=call["symbol"], wait_s=0)
        assert asdict(permit) == expected_permit(now, expect["granted"])


@pytest.mark.parametrize("case", [c for c in CASES if "store" not in c], ids=lambda case: case["name"])
async def test_a_vector_holds(place: Place, both: list[Callable[..., Any]], case: dict[str, Any]) -> None:
    for consume in both:
        now = place.now()
        names = prepare(place, case, now)
        for step in [case, *case.get("then", [])]:
            await answer(consume, step["call"], now, step["expect"])
            assert bool(place.redis.exists(names["permit"])) == step["after"]["permit_exists"]


async def test_the_vectors_of_a_store_that_is_down_hold() -> None:
    down = [case for case in CASES if case.get("store") == "down"]
    assert down
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with redis.Redis(port=unused.getsockname()[1], retry=Retry(NoBackoff(), 0)) as client:
            gate = PermitGate(client)

            async def consume(*args: Any, **kwargs: Any) -> Permit:
                return gate.consume(*args, **kwargs)

            for case in down:
                await answer(consume, case["call"], 0, case["expect"])


def test_the_vectors_name_every_reason_and_no_other() -> None:
    steps = [step for case in CASES for step in [case, *case.get("then", [])]]
    denials = {step["expect"]["denied"].partition(":")[0] for step in steps if "denied" in step["expect"]}
    assert denials == {
        "no_permit",
        "blocked",
        "expired",
        "wrong_symbol",
        "not_granted",
        "already_consumed",
        "stale_epoch",
        "malformed",
        "redis_error",
    }
    assert len({case["name"] for case in CASES}) == len(CASES)


# ---------------------------------------------------------------- what a permit and a denial look like


def test_a_permit_cannot_be_changed(armed: Place) -> None:
    armed.grant()
    permit = PermitGate(armed.redis).consume("plan-1", symbol="BTCUSDT")
    with pytest.raises(FrozenInstanceError):
        permit.computed_qty = Decimal(1)  # type: ignore[misc]


def test_a_denial_says_plan_symbol_and_reason() -> None:
    denied = PermitDenied("plan-1", "BTCUSDT", "blocked:plan_stale")
    assert str(denied) == (
        "Plan 'plan-1' on 'BTCUSDT' must not be executed: the Governor blocked it (blocked:plan_stale)."
    )
    assert (denied.plan_id, denied.code) == ("plan-1", "missing_permit_or_redis")


def test_a_denial_survives_a_process_boundary() -> None:
    denied = pickle.loads(pickle.dumps(PermitDenied("plan-1", None, "expired")))  # noqa: S301  (our own)
    assert (denied.plan_id, denied.symbol, denied.reason) == ("plan-1", None, "expired")


def test_a_denial_for_a_strange_plan_id_stays_one_short_line() -> None:
    sentence = str(PermitDenied("x\n" * 5000, "BTCUSDT", "malformed"))
    assert "\n" not in sentence
    assert len(sentence) < 400


# ---------------------------------------------------------------- clients of every make


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode_responses", [True, False])
async def test_any_client_will_do(armed: Place, decode_responses: bool, protocol: int) -> None:  # noqa: FBT001
    client = armed.client(decode_responses=decode_responses, protocol=protocol)
    gate = PermitGate(client)
    armed.grant(note="ü")
    assert gate.peek("plan-1") == gate.consume("plan-1", symbol="BTCUSDT")
    assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)) == "no_permit"
    async with armed.async_client(decode_responses=decode_responses, protocol=protocol) as async_client:
        async_gate = AsyncPermitGate(async_client)
        armed.grant(note="ü")
        assert await async_gate.peek("plan-1") == await async_gate.consume("plan-1", symbol="BTCUSDT")
        with pytest.raises(PermitDenied, match="no_permit"):
            await async_gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)


@pytest.mark.parametrize("decode_responses", [True, False])
def test_bytes_that_are_not_utf8_do_not_cost_a_permit(real: Place, decode_responses: bool) -> None:  # noqa: FBT001
    raw = permit_json(real.now(), note="@@").encode().replace(b"@@", b"\xff\xfe\x01")
    real.redis.set("quantum:permit:plan-1", raw)
    gate = PermitGate(real.client(decode_responses=decode_responses))
    assert gate.consume("plan-1", symbol="BTCUSDT").seq == 42


async def test_another_prefix_has_permits_of_its_own(armed: Place) -> None:
    state, permit = armed.redis.get("quantum:governor:state"), permit_json(armed.now())
    armed.redis.mset({"{q}:governor:state": str(state), "{q}:permit:plan-1": permit})
    assert reason_of(lambda: PermitGate(armed.redis).consume("plan-1", symbol="BTCUSDT", wait_s=0)) == "no_permit"
    async with armed.async_client() as client:
        assert (await AsyncPermitGate(client, key_prefix="{q}").peek("plan-1")).seq == 42
    assert PermitGate(armed.redis, key_prefix="{q}").consume("plan-1", symbol="BTCUSDT").seq == 42


async def test_a_server_that_forgot_the_script_is_given_it_again(armed: Place) -> None:
    async with armed.async_client() as client:
        gate, async_gate = PermitGate(armed.redis), AsyncPermitGate(client)
        for plan_id in ("plan-1", "plan-2"):
            armed.redis.script_flush()
            armed.grant(plan_id)
            assert gate.consume(plan_id, symbol="BTCUSDT").plan_id == plan_id
            armed.redis.script_flush()
            armed.grant(plan_id)
            assert (await async_gate.consume(plan_id, symbol="BTCUSDT")).plan_id == plan_id


# ---------------------------------------------------------------- peek


async def test_a_peek_takes_nothing_and_agrees_with_consume(armed: Place) -> None:
    armed.grant(computed_qty=3)
    gate = PermitGate(armed.redis)
    async with armed.async_client() as client:
        assert gate.peek("plan-1") == gate.peek("plan-1") == await AsyncPermitGate(client).peek("plan-1")
    assert gate.peek("plan-1") == gate.consume("plan-1", symbol="BTCUSDT")
    assert reason_of(lambda: gate.peek("plan-1")) == "no_permit"


def test_a_peek_leaves_even_a_permit_of_a_stale_epoch(armed: Place) -> None:
    armed.grant(epoch=6)
    assert reason_of(lambda: PermitGate(armed.redis).peek("plan-1")) == "stale_epoch"
    assert armed.has()


@pytest.mark.parametrize("plan_id", ["", "a b", "p" * 129, None])
async def test_a_peek_for_a_malformed_plan_id_asks_nobody(plan_id: Any) -> None:
    client = Recorder([])
    assert reason_of(lambda: PermitGate(client).peek(plan_id)) == "malformed"  # type: ignore[arg-type]
    with pytest.raises(PermitDenied, match="malformed"):
        await AsyncPermitGate(client).peek(plan_id)  # type: ignore[arg-type]


# ---------------------------------------------------------------- keys of the wrong type


def test_keys_that_hold_no_string_read_as_unreadable(armed: Place) -> None:
    gate = PermitGate(armed.redis)
    armed.redis.rpush("quantum:governor:block:plan-1", "x")
    assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "blocked:unknown"
    armed.grant()
    armed.redis.delete("quantum:governor:state")
    armed.redis.rpush("quantum:governor:state", "x")
    assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "stale_epoch"
    assert armed.has()
    armed.redis.delete("quantum:permit:plan-1")
    armed.redis.rpush("quantum:permit:plan-1", "x")
    assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "malformed"
    assert armed.has()


# ---------------------------------------------------------------- trouble with Redis


class Recorder:
    """A client that answers from a list, for both gates; an exception in the list is raised."""

    def __init__(self, answers: list[object]) -> None:
        self.answers = answers
        self.asked = 0

    def _next(self) -> object:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return self._next()


class AsyncRecorder(Recorder):
    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return self._next()


async def reasons(answers: Callable[[], list[object]]) -> tuple[str, str]:
    """Return what both gates say to the same answers; a gate that sleeps fails."""

    def never(_: float) -> Any:
        raise AssertionError("waited")

    gate = PermitGate(Recorder(answers()), sleep=never)  # type: ignore[arg-type]
    reason = reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT", wait_s=1))
    async_gate = AsyncPermitGate(AsyncRecorder(answers()), sleep=never)  # type: ignore[arg-type]
    with pytest.raises(PermitDenied) as denied:
        await async_gate.consume("plan-1", symbol="BTCUSDT", wait_s=1)
    return reason, denied.value.reason


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_any_error_of_the_client_denies_at_once(error: Exception) -> None:
    assert await reasons(lambda: [error, error]) == ("redis_error", "redis_error")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_while_the_script_is_loaded_denies(error: Exception) -> None:
    assert await reasons(lambda: [NoScriptError("No matching script."), error]) == (
        "redis_error",
        "redis_error",
    )


async def test_a_script_that_cannot_be_kept_denies() -> None:
    missing = NoScriptError("No matching script.")
    assert await reasons(lambda: [missing, "sha", missing]) == ("redis_error", "redis_error")


def test_the_error_behind_a_denial_is_kept() -> None:
    gate = PermitGate(Recorder([ERRORS[0]]))  # type: ignore[arg-type]
    with pytest.raises(PermitDenied) as denied:
        gate.consume("plan-1", symbol="BTCUSDT")
    assert denied.value.__cause__ is ERRORS[0]


@pytest.mark.parametrize("reply", REPLIES, ids=repr)
async def test_an_answer_of_another_shape_denies(reply: object) -> None:
    assert await reasons(lambda: [reply]) == ("redis_error", "redis_error")


@pytest.mark.parametrize("fields", [{"plan_id": "plan-2"}, {"symbol": "ETHUSDT"}])
async def test_the_answer_to_another_question_denies(fields: dict[str, str]) -> None:
    reply = [b"granted", permit_json(0, **fields).encode()]
    assert await reasons(lambda: [reply]) == ("redis_error", "redis_error")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "1",
        '{"note":' + "[" * 100_000 + "]" * 100_000 + "}",
        permit_json(0, epoch="x"),
        permit_json(0, expires_at=None),
    ],
    ids=lambda text: text[:20],
)
async def test_a_granted_permit_that_cannot_be_read_denies(text: str) -> None:
    assert await reasons(lambda: [[b"granted", text.encode()]]) == ("malformed", "malformed")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(), asyncio.CancelledError()], ids=repr)
async def test_an_interrupt_is_no_denial(interrupt: BaseException) -> None:
    with pytest.raises(type(interrupt)):
        PermitGate(Recorder([interrupt])).consume("plan-1", symbol="BTCUSDT")  # type: ignore[arg-type]
    if isinstance(interrupt, asyncio.CancelledError):
        with pytest.raises(asyncio.CancelledError):
            await AsyncPermitGate(AsyncRecorder([interrupt])).consume("plan-1", symbol="BTCUSDT")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan_id", "symbol"),
    [
        ("", "BTCUSDT"),
        ("a b", "BTCUSDT"),
        ("p\n", "BTCUSDT"),
        (7, "BTCUSDT"),
        ("p", "btc"),
        ("p", ""),
        ("p", None),
    ],
)
async def test_a_malformed_question_asks_nobody(plan_id: Any, symbol: Any) -> None:
    client = Recorder([])
    gate, async_gate = PermitGate(client), AsyncPermitGate(client)  # type: ignore[arg-type]
    assert reason_of(lambda: gate.consume(plan_id, symbol=symbol)) == "malformed"
    with pytest.raises(PermitDenied, match="malformed"):
        await async_gate.consume(plan_id, symbol=symbol)
    assert client.asked == 0


async def test_a_killed_server_denies_and_a_restarted_one_answers_again(own_server: RedisServer) -> None:
    with Place(own_server) as place:
        place.arm()
        place.grant()
        async with own_server.async_client() as client:
            gate, async_gate = PermitGate(place.redis), AsyncPermitGate(client)
            assert gate.peek("plan-1") == await async_gate.peek("plan-1")
            own_server.kill()
            for _ in range(2):  # on the connection that broke, and on one that cannot be made
                assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "redis_error"
                with pytest.raises(PermitDenied, match="redis_error"):
                    await async_gate.consume("plan-1", symbol="BTCUSDT")
            own_server.restart()
            place.arm()
            place.grant()
            assert gate.consume("plan-1", symbol="BTCUSDT").seq == 42
            with pytest.raises(PermitDenied, match="no_permit"):
                await async_gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_consumed_permit_stays_consumed_when_the_server_crashes(
    kind: Kind, new_server: Callable[..., RedisServer]
) -> None:
    server = new_server(kind, appendonly=True)
    with Place(server) as place:
        place.arm()
        place.grant("plan-1")
        place.grant("plan-2")
        PermitGate(place.redis).consume("plan-1", symbol="BTCUSDT")
        server.kill()
        server.restart()
        gate = PermitGate(place.client())
        assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)) == "no_permit"
        assert gate.consume("plan-2", symbol="BTCUSDT").plan_id == "plan-2"


class Proxy:
    """Passes bytes to a server and back, until told to cut off the next answer."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cut_next_answer = threading.Event()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        for end in [self._listener, *self._open]:
            hang_up(end)
        for thread in self._threads:
            thread.join()
        for end in [self._listener, *self._open]:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            for pump in (
                threading.Thread(target=self._requests, args=(near, far)),
                threading.Thread(target=self._answers, args=(near, far)),
            ):
                self._threads.append(pump)
                pump.start()

    def _requests(self, near: socket.socket, far: socket.socket) -> None:
        for chunk in chunks(near):
            far.sendall(chunk)
        hang_up(far)

    def _answers(self, near: socket.socket, far: socket.socket) -> None:
        for chunk in chunks(far):
            if self.cut_next_answer.is_set():
                self.cut_next_answer.clear()
                break
            near.sendall(chunk)
        hang_up(near)


def chunks(end: socket.socket) -> Iterator[bytes]:
    try:
        while chunk := end.recv(65536):
            yield chunk
    except OSError:
        return


def hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was first


@contextmanager
def proxy_to(place: Place) -> Iterator[Proxy]:
    proxy = Proxy(place.redis.connection_pool.connection_kwargs["port"])
    try:
        yield proxy
    finally:
        proxy.close()


async def test_a_reply_lost_after_the_script_ran_costs_the_permit_and_grants_nothing(real: Place) -> None:
    async with AsyncExitStack() as stack:
        proxy = stack.enter_context(proxy_to(real))
        client = stack.enter_context(redis.Redis(port=proxy.port, retry=Retry(NoBackoff(), 0)))
        async_client = await stack.enter_async_context(
            redis.asyncio.Redis(port=proxy.port, retry=redis.asyncio.retry.Retry(NoBackoff(), 0), protocol=2)
        )
        gate, async_gate = PermitGate(client), AsyncPermitGate(async_client)

        real.grant()
        assert gate.peek("plan-1").seq == 42
        proxy.cut_next_answer.set()
        assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "redis_error"
        assert not real.has()
        assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)) == "no_permit"

        real.grant()
        assert (await async_gate.peek("plan-1")).seq == 42
        proxy.cut_next_answer.set()
        with pytest.raises(PermitDenied, match="redis_error"):
            await async_gate.consume("plan-1", symbol="BTCUSDT")
        assert not real.has()
        with pytest.raises(PermitDenied, match="no_permit"):
            await async_gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)


async def test_a_client_that_retries_by_itself_is_denied_too(real: Place) -> None:
    async with AsyncExitStack() as stack:
        proxy = stack.enter_context(proxy_to(real))
        client = stack.enter_context(redis.Redis(port=proxy.port, retry=Retry(NoBackoff(), 3)))
        async_client = await stack.enter_async_context(
            redis.asyncio.Redis(port=proxy.port, retry=redis.asyncio.retry.Retry(NoBackoff(), 3), protocol=2)
        )
        gate, async_gate = PermitGate(client), AsyncPermitGate(async_client)

        real.grant()
        assert gate.peek("plan-1").seq == 42
        proxy.cut_next_answer.set()
        assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)) == "no_permit"
        assert not proxy.cut_next_answer.is_set()

        real.grant()
        assert (await async_gate.peek("plan-1")).seq == 42
        proxy.cut_next_answer.set()
        with pytest.raises(PermitDenied, match="no_permit"):
            await async_gate.consume("plan-1", symbol="BTCUSDT", wait_s=0)
        assert not proxy.cut_next_answer.is_set()


# ---------------------------------------------------------------- the brake


def test_while_the_brake_is_set_no_permit_is_given_out_whoever_is_at_work(real: Place) -> None:
    real.grant()
    gate = PermitGate(real.redis)
    for value in ("bad fills", ""):
        real.redis.set("quantum:governor:halt", value)
        assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "blocked:halted"
        assert reason_of(lambda: gate.peek("plan-1")) == "blocked:halted"
    real.redis.delete("quantum:governor:halt")
    real.redis.rpush("quantum:governor:halt", "of another type")
    assert reason_of(lambda: gate.consume("plan-1", symbol="BTCUSDT")) == "blocked:halted"
    assert real.has(), "whoever releases the brake decides what becomes of it"
    real.redis.delete("quantum:governor:halt")
    assert gate.consume("plan-1", symbol="BTCUSDT").seq == 42


# ---------------------------------------------------------------- rights

KEYS_READ = [
    "~quantum:permit:*", "%R~quantum:governor:state", "%R~quantum:governor:block:*", "%R~quantum:governor:halt"
]  # fmt: skip
COMMANDS = ["+get", "+exists", "+del", "+time", "+script|load"]
SELECTOR = "(~quantum:permit:* ~quantum:governor:state ~quantum:governor:block:* ~quantum:governor:halt +evalsha)"


@contextmanager
def user(place: Place, *rights: str) -> Iterator[redis.Redis]:
    place.redis.execute_command("ACL", "SETUSER", "apply", "reset", "on", ">pw", *rights)  # type: ignore[no-untyped-call]
    port = place.redis.connection_pool.connection_kwargs["port"]
    try:
        with redis.Redis(port=port, username="apply", password="pw", protocol=2, retry=Retry(NoBackoff(), 0)) as client:
            yield client
    finally:
        place.redis.execute_command("ACL", "DELUSER", "apply")  # type: ignore[no-untyped-call]


def test_the_rights_the_module_names_are_enough_and_forge_nothing(real: Place) -> None:
    real.grant()
    with user(real, *KEYS_READ, *COMMANDS, SELECTOR) as client:
        assert PermitGate(client).consume("plan-1", symbol="BTCUSDT").seq == 42
        forge = client.script_load("return redis.call('SET', KEYS[1], 'x')")
        with pytest.raises(ResponseError):
            client.evalsha(str(forge), 1, "quantum:permit:plan-1")


@pytest.mark.parametrize(
    "withheld",
    [
        "+get", "+exists", "+del", "%R~quantum:governor:state", "%R~quantum:governor:block:*",
        "%R~quantum:governor:halt",
    ],
)  # fmt: skip
def test_a_missing_right_is_redis_trouble_and_not_a_missing_permit(real: Place, withheld: str) -> None:
    rights = [right for right in [*KEYS_READ, *COMMANDS, SELECTOR] if right != withheld]
    if "block" not in withheld:
        real.grant()
    with user(real, *rights) as client:
        assert reason_of(lambda: PermitGate(client).consume("plan-1", symbol="BTCUSDT", wait_s=0)) == "redis_error"
    assert real.has() == ("block" not in withheld)


# ---------------------------------------------------------------- waiting


class Time:
    """A clock that moves only when slept on, with things to happen at given moments."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self.events: list[tuple[float, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.pauses.append(seconds)
        self.now += seconds
        while self.events and self.events[0][0] <= self.now - 1000:
            self.events.pop(0)[1]()

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture(params=["sync", "async"])
async def waiting(request: pytest.FixtureRequest, armed: Place) -> AsyncIterator[tuple[Time, Callable[..., Any]]]:
    """A fake clock and a `consume` that waits by it."""
    clock = Time()
    async with armed.async_client() as client:
        gate = PermitGate(armed.redis, clock=clock, sleep=clock.sleep)
        async_gate = AsyncPermitGate(client, clock=clock, sleep=clock.async_sleep)

        async def consume(*args: Any, **kwargs: Any) -> Permit:
            if request.param == "async":
                return await async_gate.consume(*args, **kwargs)
            return gate.consume(*args, **kwargs)

        yield clock, consume


Waiting = tuple[Time, Callable[..., Any]]


async def test_a_permit_that_is_there_is_taken_without_waiting(armed: Place, waiting: Waiting) -> None:
    clock, consume = waiting
    armed.grant()
    assert (await consume("plan-1", symbol="BTCUSDT")).seq == 42
    assert clock.pauses == []


async def test_a_permit_that_comes_later_is_waited_for(armed: Place, waiting: Waiting) -> None:
    clock, consume = waiting
    clock.events = [(0.5, armed.grant)]
    assert (await consume("plan-1", symbol="BTCUSDT")).seq == 42
    assert 0.5 <= clock.now - 1000 <= 0.52


async def test_a_block_record_ends_the_wait(armed: Place, waiting: Waiting) -> None:
    clock, consume = waiting
    record = json.dumps({"reason": "no_position", "timestamp": 1, "symbol": "BTCUSDT"})
    clock.events = [(0.5, lambda: armed.redis.set("quantum:governor:block:plan-1", record))]
    with pytest.raises(PermitDenied, match="blocked:no_position"):
        await consume("plan-1", symbol="BTCUSDT")
    assert 0.5 <= clock.now - 1000 <= 0.52


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"symbol": "ETHUSDT"}, "wrong_symbol"),
        ({"expires_at": 1}, "expired"),
        ({"granted": False}, "not_granted"),
        ({"consumed": True}, "already_consumed"),
        ({"epoch": 6}, "stale_epoch"),
        ({"seq": None}, "malformed"),
    ],
)
async def test_any_other_denial_ends_the_wait(
    armed: Place, waiting: Waiting, fields: dict[str, object], reason: str
) -> None:
    clock, consume = waiting
    clock.events = [(0.5, lambda: armed.grant(**fields))]  # type: ignore[arg-type]
    with pytest.raises(PermitDenied, match=reason):
        await consume("plan-1", symbol="BTCUSDT")
    assert 0.5 <= clock.now - 1000 <= 0.52


async def test_the_wait_looks_at_growing_intervals_until_its_end(waiting: Waiting) -> None:
    clock, consume = waiting
    with pytest.raises(PermitDenied, match="no_permit"):
        await consume("plan-1", symbol="BTCUSDT")
    assert clock.now - 1000 == pytest.approx(1.2)
    assert clock.pauses[0] == 0.001
    assert clock.pauses[:-1] == sorted(clock.pauses[:-1])
    assert max(clock.pauses) == 0.020
    assert len(clock.pauses) < 80


async def test_the_last_look_is_at_the_end_of_the_wait(armed: Place, waiting: Waiting) -> None:
    clock, consume = waiting
    clock.events = [(0.2999, armed.grant)]
    assert (await consume("plan-1", symbol="BTCUSDT", wait_s=0.3)).seq == 42


@pytest.mark.parametrize("wait_s", [0, -1, float("nan")])
async def test_no_wait_means_one_look(waiting: Waiting, wait_s: float) -> None:
    clock, consume = waiting
    with pytest.raises(PermitDenied, match="no_permit"):
        await consume("plan-1", symbol="BTCUSDT", wait_s=wait_s)
    assert clock.pauses == []


async def test_a_wait_that_is_cancelled_leaves_the_permit_to_others(armed: Place) -> None:
    reached = asyncio.Event()

    async def sleep(_: float) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with armed.async_client() as client:
        task = asyncio.create_task(AsyncPermitGate(client, sleep=sleep).consume("plan-1", symbol="BTCUSDT"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        armed.grant()
        assert (await AsyncPermitGate(client).consume("plan-1", symbol="BTCUSDT")).seq == 42


async def test_the_default_sleeps_are_the_real_ones(armed: Place) -> None:
    assert reason_of(lambda: PermitGate(armed.redis).consume("plan-1", symbol="BTCUSDT", wait_s=0.003)) == "no_permit"
    async with armed.async_client() as client:
        with pytest.raises(PermitDenied, match="no_permit"):
            await AsyncPermitGate(client).consume("plan-1", symbol="BTCUSDT", wait_s=0.003)


# ---------------------------------------------------------------- races

PLANS = [f"race:{n}" for n in range(200)]


def won(gate: PermitGate) -> list[str]:
    """Return the plans whose permit this one got."""
    mine = []
    for plan_id in PLANS:
        try:
            mine.append(gate.consume(plan_id, symbol="BTCUSDT", wait_s=0).plan_id)
        except PermitDenied as denied:
            assert denied.reason == "no_permit"  # noqa: PT017  (any other is a failure)
    return mine


async def won_async(gate: AsyncPermitGate) -> list[str]:
    async def one(plan_id: str) -> list[str]:
        try:
            return [(await gate.consume(plan_id, symbol="BTCUSDT", wait_s=0)).plan_id]
        except PermitDenied as denied:
            assert denied.reason == "no_permit"  # noqa: PT017  (any other is a failure)
            return []

    return [plan_id for plan_id in PLANS for plan_id in await one(plan_id)]


def won_by_hand(client: redis.Redis) -> list[str]:
    """GET and DEL as the contract allows them: go on only when DEL returned 1."""
    return [p for p in PLANS if client.get(f"quantum:permit:{p}") and client.delete(f"quantum:permit:{p}") == 1]


def grant_all(place: Place) -> None:
    raw = {f"quantum:permit:{plan_id}": permit_json(place.now(), plan_id=plan_id) for plan_id in PLANS}
    place.redis.mset(raw)


def test_of_many_threads_one_gets_each_permit(real: Place) -> None:
    grant_all(real)
    gate = PermitGate(real.redis)
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda _: won(gate), range(6)))
    assert sorted(plan_id for mine in results for plan_id in mine) == sorted(PLANS)


async def test_of_many_tasks_one_gets_each_permit(real: Place) -> None:
    grant_all(real)
    async with real.async_client() as client:
        gate = AsyncPermitGate(client)
        results = await asyncio.gather(*(won_async(gate) for _ in range(6)))
    assert sorted(plan_id for mine in results for plan_id in mine) == sorted(PLANS)


async def test_threads_tasks_and_clients_by_hand_share_each_permit_out_once(real: Place) -> None:
    grant_all(real)
    async with real.async_client() as client:
        gate, async_gate = PermitGate(real.redis), AsyncPermitGate(client)
        results = await asyncio.gather(
            asyncio.to_thread(won, gate),
            asyncio.to_thread(won_by_hand, real.client()),
            won_async(async_gate),
            won_async(async_gate),
        )
    assert sorted(plan_id for mine in results for plan_id in mine) == sorted(PLANS)


# ---------------------------------------------------------------- weight


def test_importing_the_gate_brings_no_other_package_with_it() -> None:
    program = "import sys; before = set(sys.modules); import governor.gate; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert packages - set(sys.stdlib_module_names) == {"governor"}
    assert "asyncio" not in packages
