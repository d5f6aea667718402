"""What a Redis server says of itself: whether it keeps what it is told, and whether it is the one we knew.

`judge`, `refusal` and `changed` are pure; `durability` and `identity` ask. A server that forbids CONFIG, as managed
ones do, leaves things unknown, and unknown is not durable until the operator attests it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import redis.asyncio
import redis.exceptions

from events.store import UnavailableError

Verdict = Literal["ok", "warn", "bad", "unknown"]
Change = Literal["same", "restarted", "another"]

PASSING = ("loading", "role", "aof_last_write_status")
"""What clears without anybody changing the configuration, and stops commits by itself as long as it lasts: a start
waits for it rather than being refused."""
UPTIME_SLACK_S = 1.0
"""Uptime is a difference of two clocks that were cut to whole seconds."""
_NO_ID = "0" * 40


class Finding(NamedTuple):
    """One thing the server says, against what it should say."""

    name: str
    """As INFO or CONFIG calls it."""
    seen: str | None
    """None: it does not tell."""
    wanted: str
    verdict: Verdict
    """`warn` is never a reason to refuse a start."""


class Durability(NamedTuple):
    """Whether what was committed survives the server."""

    address: str
    """Of the server that was asked."""
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of them: bad, unknown, warn, ok."""
        verdicts = [finding.verdict for finding in self.findings]
        return max(verdicts, key=("ok", "warn", "unknown", "bad").index, default="unknown")


class Server(NamedTuple):
    """Who a server is. A text is empty where the server does not tell."""

    run_id: str
    """New at every start of the process."""
    master_replid: str
    """Of its history, as replication sees it; a promotion begins a new one."""
    master_replid2: str
    """Of the history it went on from; empty if it did not."""
    role: str
    """`master` or `slave`."""
    uptime_s: int
    address: str
    """`host:port`, as this program reached it."""


async def durability(connection: redis.asyncio.Redis) -> Durability:
    """Ask the server how it keeps data, and judge it.

    Raises:
        UnavailableError: no server, or no answer.
    """
    info = await _info(connection)
    try:
        config = _told(await connection.config_get("appendfsync"))
    except redis.exceptions.ResponseError:
        config = None
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    return Durability(address(connection), judge(info, config))


def judge(info: Mapping[str, Any], config: Mapping[str, str] | None) -> tuple[Finding, ...]:
    """What to make of INFO and CONFIG GET.

    The eviction policy has to be noeviction with any maxmemory, none included: the limit can be set at any time, and
    from then on permits and events go without a word.

    Args:
        info: as redis-py parses it; empty where INFO is forbidden.
        config: what CONFIG GET answered; None where it is forbidden.
    """
    found = [
        _held(info, "role", "master"),
        _held(info, "loading", "0"),
        _held(info, "aof_enabled", "1"),
        _held(info, "aof_last_write_status", "ok"),
        _held(config or {}, "appendfsync", "everysec", "always"),
        _held(info, "maxmemory_policy", "noeviction"),
    ]
    if info.get("connected_slaves"):
        # INFO has this line only where min-replicas-to-write and its lag are both set.
        guarded = "min_slaves_good_slaves" in info
        found.append(
            Finding("min-replicas-to-write", "set" if guarded else "0", "at least 1", "ok" if guarded else "warn")
        )
    return tuple(found)


def refusal(found: Durability, *, attested: bool) -> str | None:
    """Why a start is refused where durability is required; None where it is not.

    Args:
        found: what `durability` found.
        attested: whether the operator vouches for what is unknown (`GOV_DURABILITY_ATTESTED`). Nobody can vouch for
            what the server says is bad.
    """
    lasting = [finding for finding in found.findings if finding.name not in PASSING]
    bad = [finding for finding in lasting if finding.verdict == "bad"]
    unknown = [finding.name for finding in lasting if finding.verdict == "unknown" and not attested]
    parts = [f"{finding.name} is {finding.seen!r}, expected {finding.wanted}" for finding in bad]
    if unknown:
        parts.append(
            f"it does not tell {', '.join(unknown)} (GOV_DURABILITY_ATTESTED=true if you know that it keeps data)"
        )
    if not parts:
        return None
    return f"GOV_REQUIRE_DURABLE is 'true', expected a server that keeps data, {found.address}: {'; '.join(parts)}"


async def identity(connection: redis.asyncio.Redis) -> Server:
    """Who answers on this connection now.

    Raises:
        UnavailableError: no server, or no answer.
    """
    info = await _info(connection)
    continued = _id(info.get("master_replid2"))
    return Server(
        run_id=_id(info.get("run_id")),
        master_replid=_id(info.get("master_replid")),
        master_replid2="" if continued == _NO_ID else continued,
        role=str(info.get("role", "")),
        uptime_s=int(info.get("uptime_in_seconds", 0)),
        address=address(connection),
    )


def changed(before: Server, now: Server, since_s: float) -> Change:
    """Whether the server is still the one we talked to, or another that may lack what that one had acknowledged.

    `another` is the answer in doubt, for it only costs a hold: where INFO is forbidden or lacks a field, nobody can
    tell a restart from a failover, and a failover taken for a restart lets permits of the lost branch live on beside
    new ones. So it also is after a restart on another address, and after one from an RDB file alone, which names the
    history it goes on from just as a promoted replica does.

    The same process is `another` if it followed somebody else meanwhile. A new id without a history it went on from
    is none: a primary takes one when its first replica comes, or an hour after the last one went.

    Args:
        before: who it was.
        now: who it is.
        since_s: seconds from the last answer of `before` to the asking for `now`; rather too few than too many.
    """
    if not (before.run_id and before.master_replid and now.run_id and now.master_replid):
        return "another"
    if now.role != "master" or now.address != before.address:
        return "another"
    if now.run_id == before.run_id:
        went_on = now.master_replid2 not in ("", before.master_replid2)
        return "another" if now.master_replid != before.master_replid and went_on else "same"
    if now.master_replid2 == before.master_replid or now.uptime_s > since_s + UPTIME_SLACK_S:
        return "another"
    return "restarted"


def address(connection: redis.asyncio.Redis) -> str:
    """`host:port` a client is connected to; of one that asks where to connect, where it last did."""
    pool = connection.connection_pool
    found = getattr(pool, "master_address", None)
    host, port = found or (pool.connection_kwargs.get("host", "?"), pool.connection_kwargs.get("port", "?"))
    return f"{host}:{port}"


async def _info(connection: redis.asyncio.Redis) -> dict[str, Any]:
    """INFO as redis-py parses it; empty where it is forbidden."""
    try:
        return dict(await connection.info())
    except redis.exceptions.ResponseError:
        return {}
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error


def _told(reply: Mapping[Any, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in reply.items()}


def _text(raw: bytes | str) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw


def _held(told: Mapping[str, Any], name: str, *wanted: str) -> Finding:
    seen = None if name not in told else str(told[name])
    verdict: Verdict = "unknown" if seen is None else "ok" if seen in wanted else "bad"
    return Finding(name, seen, " or ".join(wanted), verdict)


def _id(value: object) -> str:
    """An id of 40 hex digits, empty where there is none; redis-py makes a number of one that has digits only."""
    return "" if value is None else str(value).zfill(40)
