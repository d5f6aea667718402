"""`governor status --watch`: the state as it changes, for a terminal that stays open.

It follows the event stream and folds it as the daemon does; the state is never asked for. What it asks besides: the
emergency brake with each turn, and the daemon's /readyz.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from events.codec import decode
from events.store import StoreError
from governor import last_disarm
from governor.connection import connected, ledger_on, now, place
from governor.ledger import HistoryError, Ledger
from governor.readiness import Readiness, Routes
from governor.screen import Screen
from governor.settings import Settings
from governor.status import describe_live, policy_of
from governor.view import Around, View
from projections.state import State

ANSWER_S = 2.0
"""Redis has this long for an answer."""
FOLLOW_S = 1.0
"""How long a read waits for the next event."""
GATHER_S = 0.05
"""Events that come close together are folded together."""
STALE_S = 3.0
"""Not heard of Redis for so long, what is shown is stale."""
RETRY_S = 0.5
ASK_S = 2.0
"""How often the daemon is asked whether it is ready, and how long it has to say so."""
LOOK_BACK = 300
"""So many events from before are shown."""
_QUIT = (b"q", b"Q", b"\x03", b"\x04")


class Source:
    """The events as they come, folded.

    Args:
        settings: where they are.
        view: told every event, those of just before the first picture too.
        changed: called when something happened that is to be seen at once.
    """

    def __init__(self, settings: Settings, view: View, *, changed: Callable[[], None]) -> None:
        self.state: State | None = None
        """None before the first news."""
        self.heard_at: int | None = None
        self.problem: str | None = None
        self.halted: str | None = None
        self.daemon: Readiness | None = None
        self._settings = settings
        self._view = view
        self._changed = changed
        self._mode: Any = None

    @property
    def stale(self) -> bool:
        """Whether what is known may not be so any more."""
        return self.problem is not None or (self.heard_at is not None and now() - self.heard_at > STALE_S * 1e6)

    async def follow(self) -> None:
        """Fold what comes, for ever; waits for a server that is away."""
        async with connected(self._settings, answer_s=ANSWER_S) as client:
            ledger: Ledger | None = None
            while True:
                try:
                    if ledger is None:
                        ledger = await self._begin(client)
                    await self._turn(ledger)
                except (
                    HistoryError
                ) as error:  # the stream was cut, emptied or replaced: what it says now is what counts
                    ledger = None
                    await self._trouble(error)
                except (StoreError, OSError, ValueError) as error:
                    await self._trouble(error)

    async def _begin(self, client: Any) -> Ledger:
        """The state as it is, and what led to it."""
        ledger = ledger_on(client, self._settings, observe=lambda recorded, _state: self._view.note(recorded))
        await ledger.open()
        seq = ledger.state.seq
        before = await ledger.store.read(max(0, seq - LOOK_BACK), limit=min(seq, LOOK_BACK) or 1)
        found = await last_disarm.find(ledger.store, seq) if ledger.state.counts.disarms else None
        self._view.begin(found, [decode(entry) for entry in before if entry.seq <= seq])
        self.state, self.heard_at = ledger.state, now()
        self._changed()
        return ledger

    async def _turn(self, ledger: Ledger) -> None:
        if self.problem is None and await ledger.store.follow(ledger.state.seq, timeout_s=FOLLOW_S):
            await asyncio.sleep(GATHER_S)
        await ledger.catch_up()
        (halt,) = await ledger.store.values(ledger.keys.halt)
        self.state, self.heard_at = ledger.state, now()
        halted = None if halt is None else halt.decode(errors="replace")
        was = (self.problem, self.halted, self._mode)
        self.problem, self.halted, self._mode = None, halted, ledger.state.mode
        if was != (None, halted, self._mode):
            self._changed()

    async def _trouble(self, error: Exception) -> None:
        was, self.problem = self.problem, str(error)
        if was is None:
            self._changed()
        await asyncio.sleep(RETRY_S)

    async def ask_the_daemon(self) -> None:
        """Ask /readyz, again and again."""
        if self._settings.metrics_port == 0:
            return  # it took a free one, nobody knows which
        async with contextlib.aclosing(Routes(self._settings, within_s=ASK_S)) as routes:
            while True:
                was, self.daemon = self.daemon, await routes.readiness()
                if was is None or was.ready != self.daemon.ready:
                    self._changed()
                await asyncio.sleep(ASK_S)


async def watch(settings: Settings, *, every_s: float, color: bool) -> int:
    """Show the state until a key, a signal or the end of the terminal ends it.

    Args:
        settings: where Redis and the daemon are.
        every_s: seconds between two pictures; what changes the state is shown at once.
        color: False for no colours.

    Returns:
        The exit code: 0 after `q`, else 128 and the signal's number.
    """
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    screen = Screen(sys.stdout, keys, color=color)
    return await _Watch(settings, screen, every_s).run()


class _Watch:
    def __init__(self, settings: Settings, screen: Screen, every_s: float) -> None:
        self._settings, self._screen, self._every_s = settings, screen, every_s
        self._view = View(plain=screen.plain)
        self._due = asyncio.Event()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._source = Source(settings, self._view, changed=self._due.set)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end, 128 + number)
        with self._screen:
            loop.add_signal_handler(signal.SIGWINCH, self._resized)
            loop.add_signal_handler(signal.SIGTSTP, self._suspend)
            if self._screen.keys is not None:
                loop.add_reader(self._screen.keys, self._pressed, self._screen.keys)
            parts: list[Coroutine[Any, Any, None]] = [
                self._source.follow(), self._source.ask_the_daemon(), self._draw()
            ]  # fmt: skip
            tasks = [asyncio.create_task(part) for part in parts]
            for task in tasks:
                task.add_done_callback(self._over)
            try:
                return await self._ended
            finally:
                if self._screen.keys is not None:
                    loop.remove_reader(self._screen.keys)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _over(self, task: asyncio.Task[None]) -> None:
        """A part that breaks ends the view, with its error; none may be missing unnoticed."""
        if not task.cancelled() and (error := task.exception()) is not None and not self._ended.done():
            self._ended.set_exception(error)

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    def _pressed(self, keys: int) -> None:
        pressed = b""
        with contextlib.suppress(OSError):
            pressed = os.read(keys, 1024)
        if not pressed or any(key in pressed for key in _QUIT):
            self._end(0)

    def _resized(self) -> None:
        self._screen.resized()
        self._due.set()

    def _suspend(self) -> None:
        """Ctrl-Z: give the terminal back, and take it again when the shell lets us go on."""
        self._screen.__exit__(None, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._screen.__enter__()
        self._due.set()

    async def _draw(self) -> None:
        while True:
            self._due.clear()
            width, height = self._screen.size
            self._screen.show(self._picture(width, height), width)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._due.wait()

    def _picture(self, width: int, height: int) -> Any:
        source, at = self._source, now()
        told: dict[str, Any] | None = None
        if source.state is not None:
            told = describe_live(source.state, policy_of(source.state, self._settings.policy), at)
        around = Around(
            now=at, place=place(self._settings), heard_at=source.heard_at, problem=source.problem, stale=source.stale,
            daemon=source.daemon, halted=source.halted, hint="q quits",
        )  # fmt: skip
        return self._view.lines(told, around, width=width, height=height)
