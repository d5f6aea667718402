"""The lease: which of several governors reads the plans, and which keep quiet.

It protects nothing. Who commits is decided by the stream's head, inside the commit script, so a governor that was
stopped past its lease and wakes up in the middle of a commit is refused there. The lease only spares the others
the work, and says who takes over.

The key holds `{"owner", "epoch", "since", "until", "seconds"}` (times in unix seconds of the server's clock) and
never expires: `lease.lua` compares `until` with the server's clock instead. An expiring key would forget the epoch
with its owner, or need a second key for it that could disagree; and its end could not be told from one that a
server's clock, put back, has moved hours away. Only the server's clock decides whose it is, and only differences
of the local one how long that may be believed: clocks of hosts may differ as they like.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import redis.asyncio
import redis.exceptions

from governor.logs import Logger

log = Logger("governor.lease")

_SCRIPT: Final = Path(__file__).with_name("lease.lua").read_bytes()
# Names the script, as EVALSHA wants it; protects nothing.
_SCRIPT_SHA: Final = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()
_OWNER: Final = re.compile(r"[!-~]{1,200}")

LIFE: Final = 0.8
"""Part of the promised time for which the lease lives; the rest is for taking over."""
SHORTEST_S, LONGEST_S = 0.05, 3600.0
_SHORTEST_PAUSE_S: Final = 0.001


def new_owner() -> str:
    """`<host>:<pid>:<random>`: a name no other process has, a restarted one included."""
    return f"{_host()}:{os.getpid()}:{secrets.token_hex(4)}"


def _host() -> str:
    """This host, and where its process numbers count: containers may share a name."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return re.sub(r"[^!-~]|[:\[\]]", "~", f"{socket.gethostname()}~{numbers}")[:100]


def died_here(owner: str) -> bool:
    """Whether an owner was a process of this host that is no more. Of others nobody can tell."""
    host, _, rest = owner.partition(":")
    pid = rest.partition(":")[0]
    if host != _host() or not (pid.isascii() and pid.isdecimal()) or int(pid) == 0:
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


class Lease:
    """One contender for the lease. Not for concurrent use: one loop looks, and it has ended before `release`.

    Args:
        connection: a client as `events.store.client` makes it; replies are bytes.
        key: `Keys.lease`.
        owner: this contender's name, see `new_owner`.
        seconds: within this time of the owner's sudden end another one has it (`GOV_LEASE_SEC`).
        clock: monotonic seconds; only differences count.
        sleep: waits between two looks of `run`.

    Raises:
        ValueError: owner or seconds is not usable.
    """

    def __init__(
        self,
        connection: redis.asyncio.Redis,
        key: str,
        *,
        owner: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"owner is {owner!r}, expected 1 to 200 printable ASCII characters without a space")
        if not SHORTEST_S <= seconds <= LONGEST_S:
            raise ValueError(f"seconds is {seconds!r}, expected {SHORTEST_S:g} to {LONGEST_S:g}")
        self.owner = owner
        self.life_s = round(seconds * LIFE, 6)
        """How long it lives without being renewed."""
        self.owner_now: str | None = None
        """Who had it at the last look that was answered; None: nobody."""
        self.epoch = 0
        """The highest epoch seen; while it is held, ours."""
        self.problem: str | None = None
        """Why the last look was not answered; None when it was."""
        self._execute: Callable[..., Any] = connection.execute_command
        self._key = key
        self._clock = clock
        self._sleep = sleep
        self._until = self._due = clock()

    @property
    def held(self) -> bool:
        """Whether it is ours; False as soon as it may have run out."""
        return self._clock() < self._until

    async def look(self) -> bool:
        """Take it if it is free, renew it if it is ours. Never raises for trouble with the server or the key.

        Returns:
            Whether it is held afterwards.
        """
        asked = self._clock()
        left = self._until - asked
        # A server that hangs must not hide that it ran out meanwhile.
        owned_s = await self._ask("take", within_s=min(self.life_s / 3, left) if left > 0 else self.life_s / 3)
        if owned_s is not None and self.owner_now not in (None, self.owner) and died_here(self.owner_now or ""):
            # A restart need not wait for the end of what nobody holds any more.
            asked = self._clock()
            owned_s = await self._ask("take", within_s=self.life_s / 3, dead=self.owner_now or "")
        if owned_s is None:
            self._due = self._clock() + self.life_s / 10
        elif self.owner_now == self.owner:
            # From before it was sent: the server counts from later.
            self._until, self._due = asked + self.life_s, asked + self.life_s / 3
        else:
            self._until, self._due = asked, self._clock() + min(self.life_s / 10, owned_s)
        return self.held

    async def release(self) -> None:
        """Give it up, so that another one takes it at its next look. It is not held from the moment of the call.

        Where the server is away it runs out by itself.
        """
        self._until = self._due = self._clock()
        await self._ask("release", within_s=self.life_s / 3)

    async def run(self, on_gained: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Look for ever, and tell of every change; an end of this loop is one as well.

        A new epoch while it is held is told as lost and gained: somebody else may have had it in between.
        What a callback raises ends the loop: an owner that does not act must not keep the others from it.
        """
        told: int | None = None
        try:
            while True:
                await self.look()
                told = self._tell(told, on_gained, on_lost)
                await self._sleep(max(_SHORTEST_PAUSE_S, self._pause()))
                told = self._tell(told, on_gained, on_lost)
        finally:
            if told is not None:
                on_lost()

    def _pause(self) -> float:
        now = self._clock()
        return (min(self._due, self._until) if now < self._until else self._due) - now

    def _tell(self, told: int | None, on_gained: Callable[[], None], on_lost: Callable[[], None]) -> int | None:
        epoch = self.epoch if self.held else None
        if epoch != told:
            if told is not None:
                on_lost()
            if epoch is not None:
                on_gained()
        return epoch

    async def _ask(self, what: str, *, within_s: float, dead: str = "") -> float | None:
        """Run the script. Returns the seconds that are left to whoever has it; None: there was no usable answer."""
        life_us = round(self.life_s * 1_000_000)
        arguments = (1, self._key, what, self.owner, json.dumps(self.owner), life_us, self.epoch, dead)
        try:
            async with asyncio.timeout(within_s):
                try:
                    reply = await self._execute("EVALSHA", _SCRIPT_SHA, *arguments)
                except redis.exceptions.NoScriptError:
                    await self._execute("SCRIPT LOAD", _SCRIPT)
                    reply = await self._execute("EVALSHA", _SCRIPT_SHA, *arguments)
            owner, epoch, left_us = reply[0].decode(errors="replace"), int(reply[1]), int(reply[2])
        except Exception as error:  # noqa: BLE001 - broken connections let TypeError and AttributeError out too
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
            if problem != self.problem:
                log.warning("the lease cannot be asked for", problem=problem)
            self.problem = problem
            return None
        self.problem = None
        self.owner_now, self.epoch = owner or None, max(self.epoch, epoch)
        return left_us / 1e6
