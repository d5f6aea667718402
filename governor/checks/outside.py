"""Checks of what the Governor acts on: the exchange, the Apply Layer, and the way to disarm it."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from decimal import Decimal
from pathlib import Path

from governor import disarming, envfile
from governor.actuator import DRY_RUN, NAME, Actuator, ActuatorError
from governor.binance import Binance, ExchangeError
from governor.checks import AS_ROOT, UNIT, Findings, Look, shown
from governor.daemon import _ban
from governor.disarming import in_thread
from governor.helper import Helper, actuator_of, writable
from governor.settings import Settings
from projections.state import DISARMED

CLOCK_WARN_MS, CLOCK_FAIL_MS = 1000, 5000
WEIGHT_SHARE = 0.8
_AUTH = {
    -1022: "The signature does not fit: correct BINANCE_TESTNET_API_SECRET.",
    -2008: "The exchange does not know the key: correct BINANCE_TESTNET_API_KEY.",
    -2014: "That is no key of this exchange: correct BINANCE_TESTNET_API_KEY.",
    -2015: "BINANCE_TESTNET_API_KEY is unknown at this address, may not read futures, or not from this host's IP.",
}


class _Account(Binance):
    """The exchange as the daemon asks it, and one question more."""

    async def positions(self) -> int:
        """How many open positions the account has: a signed read.

        Raises:
            ExchangeError: no usable answer.
        """
        rows, _ = await self._rows(None, self._deadline(), again=True)
        return sum(Decimal(row.position_amt) != 0 for row in rows)


async def exchange(look: Look, found: Findings) -> None:
    """Whether the exchange answers, its clock, and whether it lets us ask."""
    account = _account(look)
    if account is None:
        _without_credentials(look, found)
        return
    took: list[float] = []
    account._on_call = lambda _endpoint, seconds, _outcome: took.append(seconds)  # noqa: SLF001 - see _account
    try:
        if _held_back(account, look, found):
            return
        await account.sync_clock()  # the first one pays for the connection
        await account.sync_clock()
        offset_ms, error_ms = account.offset_ms, took[-1] * 500
        used, limit = account.weight_used, account.weight_limit
    except ExchangeError as error:
        found.fail(
            f"{look.settings.base_url}: {error}",
            "Plans are blocked (position_fetch_failed) until it answers: network, BINANCE_BASE_URL, its status page.",
        )
        return
    finally:
        await account.aclose()
    told = f"its clock is {offset_ms:+d} ms of ours (±{error_ms:.0f})"
    todo = "Synchronise this host's clock: timedatectl, chronyc tracking. Ages of plans are counted by it."
    if abs(offset_ms) > CLOCK_FAIL_MS + error_ms:
        found.fail(told, todo)
    elif abs(offset_ms) > CLOCK_WARN_MS + error_ms:
        found.warn(told, todo)
    else:
        found.ok(told)
    weight = f"weight {used} of {limit} this minute"
    if used > limit * WEIGHT_SHARE:
        found.warn(weight, "The exchange bans whoever goes on: what else asks it from this IP?")
    else:
        found.ok(f"{look.settings.base_url} answers in {took[-1] * 1000:.0f} ms, {weight}")


async def credentials(look: Look, found: Findings) -> None:
    """A signed read of the positions, as before each decision. No order."""
    account = _account(look)
    if account is None:
        _without_credentials(look, found)
        return
    try:
        if account.blocked_until_us:
            found.skip("not asked: the exchange told us to stay away")
            return
        count = await account.positions()
    except ExchangeError as error:
        if error.kind == "auth":
            todo = _AUTH.get(error.code or 0, "Correct BINANCE_TESTNET_API_KEY and BINANCE_TESTNET_API_SECRET.")
        elif error.kind == "clock":
            todo = "Synchronise this host's clock: timedatectl, chronyc tracking."
        else:
            todo = "See the check exchange."
        found.fail(f"a signed read of the positions: {error}", todo)
        return
    finally:
        await account.aclose()
    found.ok(f"a signed read answers: {count} open positions")


def _account(look: Look) -> _Account | None:
    settings = look.settings
    if not settings.credentials:
        return None
    return _Account(
        base_url=settings.base_url,
        api_key=settings.api_key,
        api_secret=settings.api_secret,
        timeout_s=settings.binance_timeout_s,
        allow_mainnet=settings.allow_mainnet,
        now=look.clock,
        blocked_until_us=_ban(settings.own_journal / "exchange-ban"),
    )


def _without_credentials(look: Look, found: Findings) -> None:
    state = look.state
    loaded = state.settings if state is not None else None
    if loaded is not None and loaded.settings.get("credentials") == "true":
        found.skip("the daemon has credentials, this user cannot read them", AS_ROOT)
    else:
        found.skip("no credentials: the exchange is not asked, quantity limits decide")


def _held_back(account: Binance, look: Look, found: Findings) -> bool:
    if not account.blocked_until_us:
        return False
    left_s = (account.blocked_until_us - look.clock()) / 1e6
    found.fail(
        f"it told us to stay away for {left_s:.0f} s more, so it was not asked",
        "Wait; plans are blocked meanwhile. What else asks it from this IP?",
    )
    return True


async def apply_layer(look: Look, found: Findings) -> None:
    """The Apply Layer's file, its process, and whether both say what the state says."""
    settings = look.settings
    path = settings.apply_config_path
    try:
        data, mode_bits = path.read_bytes(), path.stat().st_mode
    except PermissionError:
        found.skip(f"{path} cannot be read by this user", AS_ROOT)
        return
    except OSError as error:
        found.fail(
            f"APPLY_CONFIG_PATH={path}: {error.strerror}",
            f"Set it to the environment file of {settings.apply_service}: without it a disarm cannot be carried out.",
        )
        return
    refusal = envfile.refusal(data)
    if refusal is not None:
        found.fail(f"systemd does not load {path}: {refusal}", "Correct it by hand.")
        return
    if mode_bits & stat.S_IROTH:
        found.warn(
            f"{path} can be read by everybody (mode {stat.S_IMODE(mode_bits):04o})",
            f"It may hold keys: chmod o= {path}",
        )
    in_file = _actuator(settings).apply_mode()
    effective, running = await _effective(settings, path, found)
    told = f"{path} says {NAME}={in_file}"
    found.ok(f"{told}, the process has {effective}" if running else told)
    _agreement(look, in_file, effective if running else None, found)


async def _effective(settings: Settings, path: Path, found: Findings) -> tuple[str | None, bool]:
    """Mode the running process has, and whether that is known."""
    unit = await shown(settings.apply_service, "LoadState", "ActiveState", "MainPID", "EnvironmentFiles")
    if unit.get("LoadState") == "not-found":
        found.fail(
            f"there is no {settings.apply_service}",
            "Set APPLY_SERVICE to the Apply Layer's unit: a disarm restarts it.",
        )
        return None, False
    files = unit.get("EnvironmentFiles")
    if unit.get("LoadState") == "loaded" and (not files or _resolved(str(path)) != _resolved(files)):
        found.warn(
            f"{settings.apply_service} does not name {path} as its last EnvironmentFile= ({files or 'none'})",
            "If another file sets APPLY_MODE after it, a disarm cannot be carried out: systemctl cat "
            f"{settings.apply_service}",
        )
    if unit.get("ActiveState") in ("inactive", "failed"):
        found.warn(f"{settings.apply_service} is {unit['ActiveState']}", f"systemctl status {settings.apply_service}")
    environ = _environ(unit.get("MainPID", "0"))
    return (None, False) if environ is None else (environ.get(NAME), True)


def _resolved(shown_file: str) -> str:
    return os.path.realpath(shown_file.partition(" (ignore_errors=")[0])


def _environ(pid: str) -> dict[str, str] | None:
    """Environment of a process; None where it may not be read."""
    try:
        content = Path(f"/proc/{int(pid)}/environ").read_bytes().decode(errors="surrogateescape")
    except (OSError, ValueError):
        return None
    return dict(entry.partition("=")[::2] for entry in reversed(content.split("\0")) if entry) or None


def _agreement(look: Look, in_file: str | None, effective: str | None, found: Findings) -> None:
    state = look.state
    if state is not None and state.mode.state == DISARMED and disarming.pending(state) is None:
        for where, mode in (("the file", in_file), ("the running process", effective)):
            if mode != DRY_RUN and not (mode is None and where != "the file"):
                found.fail(
                    f"the state is DISARMED and {where} says {NAME}={mode}: somebody set it back by hand",
                    f"Set it to {DRY_RUN} and restart {look.settings.apply_service}, or arm again with governor rearm.",
                )
        return
    if in_file is None:
        found.warn(f"the file sets no {NAME}", "Write APPLY_MODE= into it, so that nobody has to guess what it is.")
    elif effective is not None and effective != in_file:
        found.warn(
            f"the file says {in_file}, the running process has {effective}",
            f"The file counts from the next start: systemctl restart {look.settings.apply_service}, when you mean it.",
        )
    elif in_file == DRY_RUN:
        found.ok("dry run: it executes nothing")


async def disarm_path(look: Look, found: Findings) -> None:
    """Whether a disarm would get through, without doing one: the lock is taken and given back."""
    settings = look.settings
    hand = actuator_of(settings)
    way = hand.describe()
    if shutil.which("systemctl") is None:
        found.fail("no systemctl on PATH", f"Without it {settings.apply_service} cannot be restarted.")
    user = (await shown(UNIT, "User")).get("User") or None
    another = _another(user)

    def attempt() -> bool:
        with hand.locked() as taken:
            return taken

    try:
        taken = await in_thread(attempt)
        if isinstance(hand, Actuator) and not writable(settings):
            raise PermissionError(f"{settings.apply_config_path.parent} cannot be written")
    except (ActuatorError, OSError) as error:
        if another and os.geteuid() != 0:
            found.skip(f"{way}: {error}; but the daemon is user {user}", AS_ROOT)
        else:
            found.fail(
                f"{way}: {error}", "Mend what it names: a disarm could delete permits, but not stop the Apply Layer."
            )
        return
    if not taken:
        found.warn(f"{way}: somebody holds the lock beside {settings.apply_config_path}", "A disarm? Look again.")
    elif isinstance(hand, Helper) and hand.problem is not None:
        found.fail(
            f"{way}: {hand.problem}", f"All it could do is to stop {settings.apply_service}. Mend what it names."
        )
    else:
        found.ok(f"{way}: the lock was taken and given back")
    if isinstance(hand, Actuator) and another:
        found.warn(
            f"looked at as {_name(os.geteuid())}, the daemon is user {user}: it may be refused what this user may",
            f"Set GOV_DISARM_SOCKET (docs/installing.md), or look as that user: runuser -u {user} -- governor doctor",
        )


def _actuator(settings: Settings) -> Actuator:
    return Actuator(config_path=settings.apply_config_path, service=settings.apply_service, clock=lambda: 0)


def _another(user: str | None) -> bool:
    """Whether the daemon is another user than this process."""
    try:
        return user is not None and pwd.getpwnam(user).pw_uid != os.geteuid()
    except KeyError:
        return False


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
