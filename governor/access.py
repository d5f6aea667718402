"""Whether the Redis user may do what the daemon does, asked without doing any of it.

A right that is missing shows only when it is needed, and then too late: the commit script appends its events before it
writes the permit, and a refusal in between leaves a decision without its permit. So the rights are asked for before
anything is committed, by `redis.acl_check_cmd`, which answers and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import redis.asyncio
import redis.exceptions

from events.intake import CONSUMER, GROUP
from events.keys import Keys, date_of
from events.store import UnavailableError
from governor.connection import connected
from governor.durability import Finding, Verdict
from governor.settings import Settings

_SCRIPT: Final = Path(__file__).with_name("access.lua").read_text("utf-8")
TOLD_MOST: Final = 6
"""Missing rights named in one sentence."""
ASK_S: Final = 2.0
ANY: Final = "*"
"""Stands for a plan_id, a symbol or a date; it is in none of them, so there is no such key."""


class Right(NamedTuple):
    """One command, as the program sends it."""

    command: str
    """With its subcommand."""
    keys: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    """Arguments between the command and its keys."""
    after: tuple[str, ...] = ()
    """Arguments behind them."""
    told: str = ""
    """What to call it where its keys are too many to tell."""
    verdict: Verdict = "bad"
    """What follows where it is missing: `bad`, the daemon is no gate; `warn`, some command does not work."""

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.command.split(), *self.before, *self.keys, *self.after)

    @property
    def name(self) -> str:
        return self.told or " ".join((self.command, *self.keys))


def rights(keys: Keys) -> tuple[Right, ...]:
    """Everything the daemon sends, and what only the operators' commands do."""
    return (*_of_the_daemon(keys), *_of_the_commands(keys))


async def missing(connection: redis.asyncio.Redis, keys: Keys) -> tuple[Finding, ...]:
    """The rights the user lacks; none where the server cannot tell. Nothing is written and nothing left behind.

    Args:
        connection: logged in as the user.
        keys: under whose prefix.

    Raises:
        UnavailableError: no server, no answer, or no such user.
    """
    asked = rights(keys)
    words = [word for right in asked for word in (len(right.words), *right.words)]
    execute: Callable[..., Any] = connection.execute_command
    try:
        answers = await execute("EVAL", _SCRIPT, 0, *words)
    except redis.exceptions.NoPermissionError:
        return (_lacking(Right("EVAL", (keys.plans,))),)
    except redis.exceptions.ResponseError:  # scripts cannot ask on every server: then commits tell
        return ()
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
    return tuple(_lacking(right) for right, answer in zip(asked, answers, strict=True) if answer == 0)


async def default_user(connection: redis.asyncio.Redis, settings: Settings) -> tuple[Finding, ...]:
    """What is wrong with the server's user `default`; nothing where it is well, or nobody can tell.

    It is who comes in without a name: where it may write permits without a password, every program that reaches the
    server can grant itself what it likes (`warn`). And it is whose rights most servers check when they read a commit
    back from their append-only file: what it may not do is left out without a word, and the events are gone after a
    restart (`bad`). So it has to have every right, and to be off.

    Args:
        connection: logged in as the daemon.
        settings: where to try without a name.
    """
    found = [await _open_to_all(settings), await _forgets(connection, Keys(settings.key_prefix))]
    return tuple(finding for finding in found if finding is not None)


async def _open_to_all(settings: Settings) -> Finding | None:
    anyone = msgspec.structs.replace(settings, redis_username="", redis_password="")
    try:
        async with connected(anyone, answer_s=ASK_S) as connection:
            execute: Callable[..., Any] = connection.execute_command
            # `*` is no option of SET and in no plan_id: it is refused whoever asks, one way or the other.
            await execute("SET", Keys(settings.key_prefix).permit(ANY), "", ANY)
    except redis.exceptions.ResponseError as error:
        if "syntax error" in str(error):
            return Finding("default user", "may write permits, without a password", "off, or with a password", "warn")
    except Exception:  # noqa: BLE001 - redis-py lets more than its own errors out; who is not let in may do nothing
        return None
    return None


async def _forgets(connection: redis.asyncio.Redis, keys: Keys) -> Finding | None:
    execute: Callable[..., Any] = connection.execute_command
    try:
        answer = await execute("ACL", "DRYRUN", "default", "XADD", keys.events, "*", "", "")
    except Exception:  # noqa: BLE001 - not allowed to ask, or nobody there to answer
        return None
    if answer in (b"OK", "OK"):
        return None
    return Finding(
        "default user", "may not write events", "off, with all rights (~* &* +@all), see docs/redis.md", "bad"
    )


def refusal(user: str, found: Sequence[Finding]) -> str | None:
    """Why the daemon cannot work with these rights, in one sentence; None where it can.

    Args:
        user: REDIS_USERNAME, empty for the default one.
        found: what `missing` found.
    """
    lacking = [finding.name for finding in found if finding.verdict == "bad"]
    if not lacking:
        return None
    more = f" and {len(lacking) - TOLD_MOST} more" if len(lacking) > TOLD_MOST else ""
    return (
        f"REDIS_USERNAME is {user!r}, expected a user whose access rules allow: "
        f"{', '.join(lacking[:TOLD_MOST])}{more} (deploy/redis/users.acl has the rules)"
    )


def _lacking(right: Right) -> Finding:
    return Finding(right.name, "NOPERM", "allowed", right.verdict)


def _of_the_daemon(keys: Keys) -> Iterator[Right]:
    permit, executions = keys.permit(ANY), keys.executions(ANY)
    dated = map(_of_any_day, (keys.daily(ANY, 0), keys.daily_qty(ANY, 0), keys.disarm(0)))
    strings = (keys.state, keys.halt, permit, keys.block(ANY), *dated)
    streams = (keys.plans, keys.results)
    together = (keys.events, *strings, executions, *streams)
    script = "0" * 40
    # The commit script: its own right is on all of its keys at once, those of what it does on each.
    yield Right("SCRIPT LOAD", after=("",))
    yield Right(
        "EVALSHA", together, before=(script, str(len(together))), told="EVALSHA on all keys of a commit at once"
    )
    yield Right("XREVRANGE", (keys.events,), after=("+", "-"))
    yield Right("XADD", (keys.events,), after=("*", "", ""))
    yield Right("EXISTS", (permit,))
    yield Right("TIME")
    yield Right("GET", (keys.halt,))
    for key in (keys.halt, *streams):
        yield Right("TYPE", (key,))
    for key in strings:
        yield Right("SET", (key,), after=("",))
    for key in (*strings, executions):
        yield Right("DEL", (key,))
    yield Right("RPUSH", (executions,), after=("",))
    yield Right("PEXPIRE", (executions,), after=("0",))
    for key in streams:
        yield Right("XACK", (key,), after=(GROUP, "0"))
    # The other scripts and plain commands of the daemon.
    for key in streams:
        yield Right("EVAL", (key,), before=("", "1"))
        yield Right("XGROUP CREATE", (key,), after=(GROUP, "0"))
        yield Right("XGROUP SETID", (key,), after=(GROUP, "0"))
        yield Right("XINFO STREAM", (key,))
        yield Right("XINFO GROUPS", (key,))
        yield Right("XPENDING", (key,), after=(GROUP,))
        yield Right("EXISTS", (key,))
    yield Right("XREADGROUP", streams, before=("GROUP", GROUP, CONSUMER, "STREAMS"), after=(">", ">"))
    yield Right("EVALSHA", (keys.lease,), before=(script, "1"))
    yield Right("GET", (keys.lease,))
    yield Right("SET", (keys.lease,), after=("",))
    yield Right("SET", (keys.restorer,), after=("",))
    yield Right("MGET", (keys.halt, keys.state, keys.snapshot, keys.restorer, permit))
    yield Right("EXISTS", (keys.halt,))
    yield Right("XRANGE", (keys.events,), after=("-", "+"))
    yield Right("XREAD", (keys.events,), before=("STREAMS",), after=("0",))


def _of_any_day(key: str) -> str:
    return key.removesuffix(date_of(0)) + ANY


def _of_the_commands(keys: Keys) -> Iterator[Right]:
    yield Right("INFO", verdict="warn")
    yield Right("XTRIM", (keys.events,), after=("MINID", "0"), verdict="warn")
    yield Right("SCAN", after=("0",), verdict="warn")
    yield Right("SET", (keys.snapshot,), after=("",), verdict="warn")
    for key in (keys.state, keys.executions(ANY), keys.snapshot):
        yield Right("TYPE", (key,), verdict="warn")
    for key in (keys.state, keys.snapshot, _of_any_day(keys.daily(ANY, 0))):
        yield Right("GET", (key,), verdict="warn")
    yield Right("LRANGE", (keys.executions(ANY),), after=("0", "-1"), verdict="warn")
