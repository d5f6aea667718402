"""What people are told by a real daemon, over real HTTP and SMTP: disarms, drift, quarantine, and what it loses."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from governor.sim.apply_layer import result_fields
from governor.sim.exchange import Response
from tests.conftest import NewServer
from tests.daemon import Daemon, daemon, events_of, publish, wait_for
from tests.receivers import HttpReceiver, MailReceiver
from tests.servers import Kind, RedisServer
from tests.test_end_to_end import CREDENTIALS, Exchange
from tests.test_history import other_history

SOON = {"GOV_FALLBACK_QTY": "0.001", "GOV_ALERT_AFTER_SEC": "0.2", "GOV_ALERT_LINK": "https://ops.example/governor"}


@pytest.fixture
def server(running_server: Callable[[Kind], RedisServer]) -> RedisServer:
    """One kind: the server has no part in what is held here."""
    one = running_server("valkey")
    with one.client() as client:
        client.flushall()
    return one


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as one:
        yield one


@pytest.fixture
def web() -> Iterator[HttpReceiver]:
    with HttpReceiver() as one:
        yield one


def burst(client: redis.Redis, symbol: str = "BTCUSDT") -> None:
    for n in range(3):
        publish(client, f"{symbol}-{n}-{time.monotonic_ns()}", symbol)


def told(web: HttpReceiver) -> list[str]:
    """Titles without account and host."""
    return [title.partition("] ")[2] for title in web.titles]


def counted(one: Daemon, result: str) -> int:
    (value,) = re.findall(rf'quantum_govern_alerts_total{{result="{result}"}} (\d+)', one.http("/metrics"))
    return int(value)


# ---------------------------------------------------------------- events


def test_a_disarm_its_proof_and_the_rearm_reach_phone_and_mailbox(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    with (
        MailReceiver() as mail,
        daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=f"{web.url}\n{mail.url}") as one,
    ):
        burst(client)
        started = web.told("DISARMED: burst_limit_breach (BTCUSDT 3 in 5 min, limit 2)")
        web.told("DISARM DONE: APPLY_MODE=dry_run + restart, proven after ")
        assert one.command("rearm", "--reason", "limits checked").returncode == 0
        web.told("RE-ARMED by tester: limits checked")
        wait_for(lambda: len(mail.mails) == 6, what="three mails to two people")
        wait_for(lambda: counted(one, "sent") == 6)
        assert "quantum_govern_alerts_waiting 0.0" in one.http("/metrics")
    (event,) = events_of(client, "DISARM_STARTED")
    assert started["title"].startswith(f"[quantum@{os.uname().nodename}] ")
    assert started["type"] == "failure"
    assert f", event {event['seq']}, account quantum on " in started["message"]
    assert started["message"].endswith("https://ops.example/governor")
    assert str(one.config) in started["message"]
    assert [subject for to, subject, _ in mail.mails if to == ["b@ops.example"]] == web.titles
    assert "hunter2" not in one.log


def test_an_execution_around_the_gate_is_told_and_so_is_what_follows(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=web.url):
        publish(client, "p-1", "BTCUSDT", "NO_SUCH_ACTION")
        wait_for(lambda: events_of(client, "DECISION"))
        plan = {"plan_id": "p-1", "symbol": "BTCUSDT"}
        fields = result_fields(plan, executed=True, qty="0.01", error="", now=time.time())
        client.xadd("quantum:stream:apply.result", fields)  # type: ignore[arg-type]
        found = web.told("UNPERMITTED EXECUTION: BTCUSDT, plan p-1 (permit none)")
        web.told("DISARMED: unpermitted_execution (BTCUSDT, plan p-1)")
    assert "Done: the gate disarms" in found["message"]
    assert "`governor explain p-1`" in found["message"]


def test_a_throttle_and_its_end_are_told(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    more = {"GOV_ENABLE_AUTO_DISARM": "false", "GOV_THROTTLE_COOLDOWN_SEC": "1", "GOV_ALERT_URLS": web.url}
    with daemon(tmp_path, port=server.port, environ=SOON | more):
        burst(client)
        web.told("THROTTLED: burst_limit_exceeded (BTCUSDT)")
        web.told("RECOVERED: ARMED again")
    assert len(told(web)) == 2


def test_a_drift_and_its_end_are_told(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=web.url) as one:
        assert one.command("disarm", "--reason", "bad fills").returncode == 0
        web.told("DISARMED by tester: bad fills")
        one.config.write_text("APPLY_MODE=live\n")
        web.told("DRIFT: APPLY_MODE=live while DISARMED")
        one.config.write_text("APPLY_MODE=dry_run\n")
        web.told("DRIFT ENDED: APPLY_MODE=dry_run again")


def test_a_disarm_that_fails_is_told_once_and_after_a_crash_as_unfinished_and_nothing_old_with_it(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    (tmp_path / "fails").write_text("1")
    with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=web.url) as one:
        burst(client)
        failed = web.told("DISARM FAILED: ")
        assert "Attempt 1 " in failed["message"]
        assert f"set APPLY_MODE=dry_run in {one.config}" in failed["message"]
        wait_for(lambda: len(events_of(client, "DISARM_FAILED")) == 2, what="a second attempt")
        one.kill()
        assert [title.split(":")[0] for title in told(web)] == ["DISARMED", "DISARM FAILED"]
        web.posts.clear()
        (tmp_path / "fails").write_text("0")
        one.start()
        done = web.told("DISARM DONE: ")
        assert "after 2 attempts that failed" in done["message"]
        assert told(web)[0] == "DISARM UNFINISHED: DISARMED: burst_limit_breach (BTCUSDT 3 in 5 min, limit 2)"
        assert len(told(web)) == 2
        one.kill()
        count = len(web.posts)
        one.start()
        publish(client, "later", "ETHUSDT")
        wait_for(lambda: any(event["plan_id"] == "later" for event in events_of(client, "DECISION")))
        assert len(web.posts) == count, "a disarm that is done is not told again"


def test_without_a_url_nothing_is_told_and_nothing_is_counted(
    server: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=server.port, environ=SOON) as one:
        burst(client)
        wait_for(lambda: events_of(client, "AUTO_DISARM"))
        assert [counted(one, result) for result in ("sent", "failed", "dropped")] == [0, 0, 0]
        assert '"alert"' not in one.log


# ---------------------------------------------------------------- conditions


def test_redis_lost_and_back_is_told(new_server: NewServer, web: HttpReceiver, tmp_path: Path) -> None:
    server = new_server("valkey", appendonly=True)
    with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=web.url):
        server.kill()
        lost = web.told("REDIS LOST: ")
        assert "no permit is granted" in lost["message"]
        server.start()
        web.told("REDIS BACK after ")
    assert [title.split()[1] for title in told(web)] == ["LOST:", "BACK"]


def test_a_blip_of_redis_is_not_told(new_server: NewServer, web: HttpReceiver, tmp_path: Path) -> None:
    server = new_server("valkey", appendonly=True)
    with daemon(
        tmp_path, port=server.port, environ=SOON | {"GOV_ALERT_AFTER_SEC": "60"}, GOV_ALERT_URLS=web.url
    ) as one:
        server.kill()
        wait_for(lambda: "quantum_govern_store_up 0.0" in one.http("/metrics"))
        server.start()
        wait_for(lambda: "quantum_govern_store_up 1.0" in one.http("/metrics"))
        with server.client() as client:
            burst(client)
            web.told("DISARM DONE: ")
    assert not any("REDIS" in title for title in told(web))


def test_a_server_that_is_away_at_the_start_is_told(new_server: NewServer, web: HttpReceiver, tmp_path: Path) -> None:
    server = new_server("valkey")
    server.kill()
    with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=web.url, ready=False):
        web.told("REDIS LOST: ")


def test_a_quarantine_and_its_end_are_told(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=web.url) as one:
        for n in range(3):
            publish(client, f"plan-{n}", "ETHUSDT", "NO_SUCH_ACTION")
        wait_for(lambda: len(events_of(client, "DECISION")) == 3)
        other_history(client)
        found = web.told("QUARANTINED: two histories")
        assert "governor rearm --accept-history" in found["message"]
        assert one.command("rearm", "--accept-history", "--reason", "looked at it").returncode == 0
        web.told("QUARANTINE ENDED after ")
    assert [title for title in told(web) if "REDIS" in title] == []


def test_a_journal_that_cannot_be_written_is_told(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.write_text("not a directory")
    environ = SOON | {"GOV_JOURNAL_DIR": str(place / "journal"), "GOV_ALERT_URLS": web.url}
    with daemon(tmp_path, port=server.port, environ=environ):
        lost = web.told("JOURNAL LOST: ")
        assert str(place) in lost["message"]
        place.unlink()
        web.told("JOURNAL BACK after ")


def test_an_exchange_that_stops_answering_is_told_and_so_is_its_return(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    limits = {"GOV_MAX_EXEC_PER_HOUR": "off", "GOV_MAX_EXEC_PER_5MIN": "off", "GOV_ALERT_URLS": web.url}
    limits |= {"GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "off"}
    with (
        Exchange() as exchange,
        daemon(tmp_path, port=server.port, base_url=exchange.base_url, environ=SOON | CREDENTIALS | limits),
    ):
        exchange.set("BTCUSDT", "0.02", "50000")
        exchange.sim.faults = lambda _request: Response(503, b"{}")
        asked = iter(range(1000))

        def still(words: str) -> Callable[[], bool]:
            def look() -> bool:
                plan_id = f"plan-{next(asked)}"
                publish(client, plan_id, "BTCUSDT")
                wait_for(lambda: any(event["plan_id"] == plan_id for event in events_of(client, "DECISION")))
                return any(title.startswith(words) for title in told(web))

            return look

        wait_for(still("EXCHANGE LOST: server_error"))
        exchange.sim.faults = None
        wait_for(still("EXCHANGE BACK after "))
    assert [title.split()[1] for title in told(web)] == ["LOST:", "BACK"]


# ---------------------------------------------------------------- several governors


def test_the_active_governor_tells_events_and_all_of_them_a_lost_redis(
    new_server: NewServer, web: HttpReceiver, tmp_path: Path
) -> None:
    server = new_server("valkey", appendonly=True)
    with (
        HttpReceiver() as other,
        server.client() as client,
        daemon(tmp_path / "a", port=server.port, environ=SOON, GOV_ALERT_URLS=web.url),
        daemon(tmp_path / "b", port=server.port, environ=SOON, GOV_ALERT_URLS=other.url),
    ):
        burst(client)
        web.told("DISARM DONE: ")
        server.kill()
        web.told("REDIS LOST: ")
        other.told("REDIS LOST: ")
    assert not any(title.startswith("DISARM") for title in told(other))


def test_whoever_takes_over_tells_a_disarm_that_has_no_proof(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "fails").write_text("1")
    with (
        HttpReceiver() as other,
        daemon(tmp_path / "a", port=server.port, environ=SOON, GOV_LEASE_SEC="1", GOV_ALERT_URLS=web.url) as one,
        daemon(tmp_path / "b", port=server.port, environ=SOON, GOV_LEASE_SEC="1", GOV_ALERT_URLS=other.url) as two,
    ):
        burst(client)
        web.told("DISARM FAILED: ")
        wait_for(
            lambda: 'quantum_govern_state{state="DISARMED"} 1.0' in two.http("/metrics"), what="the standby to know"
        )
        assert other.posts == []
        one.kill()
        other.told("DISARM UNFINISHED: ")
        other.told("DISARM DONE: ")


# ---------------------------------------------------------------- never in the way


def test_a_target_that_hangs_delays_neither_permits_nor_other_targets_nor_the_end(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    limits = {"GOV_MAX_EXEC_PER_HOUR": "off", "GOV_MAX_EXEC_PER_5MIN": "off", "GOV_MAX_REDUCE_QTY_PER_DAY": "0.0185"}
    with HttpReceiver() as dead:
        dead.hang()
        urls = f"{dead.url} {dead.url}/2?rto=60 {web.url}"
        with daemon(tmp_path, port=server.port, environ=SOON | limits, GOV_ALERT_URLS=urls) as one:
            for n in range(20):  # the nineteenth throttles
                publish(client, f"btc-{n}", "BTCUSDT")
            web.told("THROTTLED: daily_limit_exceeded (BTCUSDT)")
            wait_for(lambda: len(dead.posts) >= 2)
            for n in range(18):
                began = time.monotonic()
                publish(client, f"eth-{n}", "ETHUSDT")
                wait_for(lambda n=n: client.exists(f"quantum:permit:eth-{n}"), within_s=1)  # type: ignore[misc]
                assert time.monotonic() - began < 1
            assert "quantum_govern_alerts_waiting 2.0" in one.http("/metrics")
            code, seconds = one.stop()
    assert code == 0
    assert seconds < 4
    assert "alerts were not sent before the end" in one.log


def test_a_target_that_comes_back_gets_what_it_missed_and_the_other_one_nothing_twice(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    with HttpReceiver() as flaky:
        flaky.status = 503
        with daemon(tmp_path, port=server.port, environ=SOON, GOV_ALERT_URLS=f"{flaky.url} {web.url}") as one:
            burst(client)
            web.told("DISARM DONE: ")
            wait_for(lambda: counted(one, "failed") >= 2, what="a second attempt")
            flaky.status = 200
            wait_for(lambda: counted(one, "sent") == 4)
            assert '"alert not sent"' in one.log
            assert "hunter2" not in one.log
    assert len(web.posts) == 2
    assert [title.split(":")[0] for title in told(flaky)[-2:]] == ["DISARMED", "DISARM DONE"]


# ---------------------------------------------------------------- settings and commands


@pytest.fixture
def asks(tmp_path: Path) -> Daemon:
    """Commands alone: neither a daemon nor a server."""
    return Daemon(tmp_path, port=1, environ={})


def test_the_test_command_says_of_each_target_whether_it_took_it(asks: Daemon, web: HttpReceiver) -> None:
    with MailReceiver() as mail:
        done = asks.command("alerts", "test", GOV_ALERT_URLS=f"{web.url} {mail.url}")
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.rpartition(",")[0] for line in done.stdout.splitlines()] == ["sent   1 JSON", "sent   2 E-Mail"]
        assert len(mail.mails) == 2
    (post,) = web.posts
    assert post["title"].endswith("] TEST: alerts reach you here")
    assert post["type"] == "info"


def test_the_test_command_fails_where_one_target_does_not_take_it(asks: Daemon, web: HttpReceiver) -> None:
    with HttpReceiver() as refusing:
        refusing.status = 403
        done = asks.command("alerts", "test", "--json", GOV_ALERT_URLS=f"{web.url} {refusing.url}")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["sent"] == 1
    first, second = answer["targets"]
    assert (first["target"], first["sent"], first["error"]) == ("1 JSON", True, None)
    assert (second["target"], second["sent"]) == ("2 JSON", False)
    assert "403" in second["error"]
    assert "hunter2" not in done.stdout + done.stderr


def test_the_test_command_without_a_url_says_so(asks: Daemon) -> None:
    done = asks.command("alerts", "test")
    assert (done.returncode, done.stdout) == (1, "")
    assert "GOV_ALERT_URLS is empty" in done.stderr


@pytest.mark.parametrize("words", [("run",), ("alerts", "test")])
@pytest.mark.parametrize("url", ["tgram://hunter2", "nosuch://hunter2", "hunter2"])
def test_a_url_that_cannot_be_used_ends_the_start_without_showing_it(
    asks: Daemon, words: tuple[str, ...], url: str
) -> None:
    done = asks.command(*words, GOV_ALERT_URLS=url)
    assert done.returncode == 78
    assert "GOV_ALERT_URLS is (hidden), expected " in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("words", [("run",), ("alerts", "test")])
def test_without_the_extra_the_start_says_how_to_install_it(
    asks: Daemon, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "apprise.py").write_text('raise ImportError("No module named apprise")\n')
    done = asks.command(*words, GOV_ALERT_URLS="json://127.0.0.1/", PYTHONPATH=str(tmp_path))
    assert done.returncode == 78
    assert "pip install 'quantum-governor[alerts]'" in done.stderr


def test_a_credential_file_gives_the_urls(
    server: RedisServer, client: redis.Redis, web: HttpReceiver, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "GOV_ALERT_URLS").write_text(f"{web.url}\n")
    with daemon(tmp_path, port=server.port, environ=SOON, CREDENTIALS_DIRECTORY=str(credentials)) as one:
        assert one.process is not None
        burst(client)
        web.told("DISARM DONE: ")
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(10) == 0
