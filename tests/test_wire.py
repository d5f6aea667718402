"""The connection that the two commands go over which every plan waits for, against real servers."""

import asyncio
import os
import signal

import pytest
import redis.asyncio
import redis.exceptions

from events import store
from events.wire import Wire
from tests.servers import RedisServer


def client(server: RedisServer, *, answer_s: float = 5) -> store.Client:
    return store.client(host=server.host, port=server.port, socket_timeout=answer_s)


async def test_answers_come_in_the_order_of_the_commands(server: RedisServer) -> None:
    async with client(server) as one:
        wire = Wire(one)
        await wire.connect()
        asked = [wire.send("ECHO", str(number)) for number in range(100)]
        assert await asyncio.gather(*asked) == [b"%d" % number for number in range(100)]


async def test_an_error_the_server_answers_with_is_redis_pys_and_keeps_the_connection(server: RedisServer) -> None:
    async with client(server) as one:
        wire = Wire(one)
        number = await wire.ask("CLIENT", "ID")
        with pytest.raises(redis.exceptions.NoScriptError):
            await wire.ask("EVALSHA", "0" * 40, 0)
        assert await wire.ask("CLIENT", "ID") == number


async def test_what_a_replica_refuses_ends_the_connection_for_its_name_may_lead_to_the_primary_by_now(
    own_server: RedisServer,
) -> None:
    async with client(own_server) as one:
        wire = Wire(one)
        numbers = {await wire.ask("CLIENT", "ID"), await one.client_id()}
        await one.replicaof("127.0.0.1", 1)
        for command in (wire.ask, one.execute_command):
            with pytest.raises(redis.exceptions.ReadOnlyError):
                await command("SET", "a", "b")
        assert not wire.up
        assert numbers.isdisjoint({await wire.ask("CLIENT", "ID"), await one.client_id()})


async def test_what_cannot_be_sent_waits_for_no_answer(server: RedisServer) -> None:
    async with client(server) as one:
        wire = Wire(one)
        with pytest.raises(TypeError):
            await wire.ask("ECHO", None)
        assert await wire.ask("ECHO", "mine") == b"mine"


async def test_what_is_made_of_an_answer_is_made_before_any_task_hears_of_it(server: RedisServer) -> None:
    async with client(server) as one:
        wire = Wire(one, text=True)
        made: list[str] = []

        def make(reply: str) -> int:
            asyncio.get_running_loop().call_soon(made.append, "later")
            made.append(reply)
            return len(reply)

        assert await wire.ask("ECHO", "four", then=make) == 4
        assert made[0] == "four"
        with pytest.raises(TypeError):
            await wire.ask("ECHO", "four", then=lambda reply: reply + 1)
        assert await wire.ask("ECHO", b"a\xff") == r"a\xff"


async def test_a_command_that_is_given_up_ends_the_connection_and_leaves_no_answer(server: RedisServer) -> None:
    async with client(server) as one:
        wire = Wire(one)
        number = await wire.ask("CLIENT", "ID")
        waiting = asyncio.create_task(wire.heard(wire.send("BLPOP", "wire-nothing", 5)))
        behind = wire.send("ECHO", "behind")
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(redis.exceptions.ConnectionError, match="given up"):
            await behind
        assert not wire.up
        assert await wire.ask("ECHO", "mine") == b"mine"
        assert await wire.ask("CLIENT", "ID") != number


async def test_a_command_without_an_answer_in_time_ends_the_connection(server: RedisServer) -> None:
    async with client(server, answer_s=0.05) as one:
        wire = Wire(one)
        with pytest.raises(redis.exceptions.TimeoutError):
            await wire.ask("BLPOP", "wire-nothing", 5)
        assert not wire.up
        assert await wire.ask("ECHO", "mine") == b"mine"


async def test_what_a_server_has_not_taken_when_it_is_given_up_is_not_sent_later(own_server: RedisServer) -> None:
    async with client(own_server, answer_s=0.2) as one:
        wire = Wire(one)
        await wire.connect()
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(redis.exceptions.TimeoutError):
                await wire.ask("SET", "large", b"x" * 50_000_000)
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        assert await wire.ask("EXISTS", "large") == 0


async def test_a_connection_the_server_closes_fails_what_waits_and_is_made_anew(own_server: RedisServer) -> None:
    async with client(own_server) as one:
        wire = Wire(one)
        waiting = asyncio.ensure_future(wire.ask("BLPOP", "nothing", 5))
        await asyncio.sleep(0)
        with own_server.client() as other:
            async with asyncio.timeout(5):
                while not other.info("clients")["blocked_clients"]:
                    await asyncio.sleep(0)
            other.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(redis.exceptions.ConnectionError):
            await waiting
        assert await wire.ask("ECHO", "again") == b"again"


async def test_closing_the_client_closes_the_connection(server: RedisServer) -> None:
    one = client(server)
    wire = Wire(one)
    await wire.connect()
    async with asyncio.timeout(1):
        await one.aclose()
    assert not wire.up


async def test_only_plain_connections_are_taken(server: RedisServer) -> None:
    async with client(server) as one, store.client(unix_socket_path="/nowhere") as other:
        assert Wire.takes(one)
        assert not Wire.takes(other)
    assert not Wire.takes(object())
