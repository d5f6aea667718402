"""The command line. Each command imports what it needs, so that asking is quick at night too."""

from __future__ import annotations

import asyncio
import datetime as dt
import getpass
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn

import click

from governor.times import utc

if TYPE_CHECKING:
    from events.store import RedisStore
    from events.types import Head, Recorded
    from governor.replay import Replay
    from governor.settings import Settings

DONE, FAILED, USAGE, DIFFERS, NO_REDIS, BAD_SETTINGS = 0, 1, 2, 3, 4, 78
CODES = (
    "\b\nExit codes: 0 done, 1 failed, 2 usage, 3 neither ARMED nor THROTTLED (status)\n"
    "or something differs (replay, rebuild --check), "
    "4 Redis not reachable, 78 bad settings."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def _reason(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("say why; it is recorded")
    return value.strip()[:500]


reason_option = click.option("--reason", required=True, metavar="TEXT", callback=_reason, help="Why. It is recorded.")


@click.group(epilog=CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantum-governor")
def main() -> None:
    """The last gate before a trading bot's orders.

    Settings come from the environment; `governor settings` shows the effective ones.

    \b
    Examples:
      governor run                          the daemon, as systemd starts it
      governor status                       the state, windows and totals
      governor events --follow              events as they happen
      governor explain PLAN_ID              one plan's life
      governor replay                       audit: does every decision follow from its inputs?
      governor rebuild --check              do the public keys say what the events say?
      governor disarm --reason "bad fills"  stop trading now
    """
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


@main.command()
def run() -> None:
    """Run the daemon until SIGTERM."""
    from governor import daemon  # noqa: PLC0415 - each command imports what it needs

    sys.exit(daemon.main(_settings()))


@main.command()
@click.option("--seconds", type=click.FloatRange(min=1), help="Run without the live view for so long, then sum up.")
@click.option("--speed", type=click.FloatRange(1, 10), default=1.0, show_default=True, help="Tell the story faster.")
@click.option("--var", "directory", default="var", show_default=True, help="Where the demo keeps its data.")
@click.option("--port", type=int, default=0, help="Port of the embedded server; a free one by default.")
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), help="Keep a picture of the live view.")
@json_option
def demo(*, seconds: float | None, speed: float, directory: str, port: int, svg: str | None, as_json: bool) -> None:
    """Everything on an embedded server, with a simulated exchange and Apply Layer.

    The daemon is the real one, as a process of its own. Within a minute: permits, blocks with their reasons, an
    expiry, a burst that disarms, the Apply Layer set to dry run, and a re-arm. Ctrl-C leaves nothing running.
    """
    try:
        from governor import demo as the_demo  # noqa: PLC0415
    except ImportError as error:
        _fail(f"the demo needs the packages of the extra 'demo': pip install '.[demo]' ({error})", FAILED)
    code = the_demo.main(directory=directory, port=port, seconds=seconds, speed=speed, svg=svg, as_json=as_json)
    sys.exit(code)


@main.command(epilog=CODES)
@json_option
def status(*, as_json: bool) -> None:
    """The state, and every symbol's windows and totals against its limits."""

    async def work() -> int:
        from governor import status as views  # noqa: PLC0415
        from governor.connection import connected, ledger_on, now  # noqa: PLC0415

        settings = _settings(logs=True)
        async with connected(settings) as client:
            ledger = ledger_on(client, settings)
            await ledger.open()
            (halt,) = await ledger.store.values(ledger.keys.halt)
            told = views.describe(ledger.state, views.policy_of(ledger.state, settings.policy), now())
        if not ledger.state.seq:
            told |= {"state": None, "since": None, "epoch": None}
        told["halted"] = None if halt is None else halt.decode(errors="replace")
        if as_json:
            _print_json(told)
        elif told["state"] is None:
            from governor.by_hand import nothing_here  # noqa: PLC0415

            click.echo(nothing_here(settings))
        else:
            _print_status(told)
        return DONE if told["state"] in ("ARMED", "THROTTLED") else DIFFERS

    _run(work())


@main.command()
@click.option("--follow", "-f", is_flag=True, help="Go on as new ones come.")
@click.option(
    "--limit",
    "-n",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="How many of the last ones; 0 for all.",
)
@click.option("--name", multiple=True, metavar="EVENT", help="Only events of this name (repeatable).")
@click.option("--plan", metavar="PLAN_ID", help="Only events of this plan.")
@click.option("--symbol", help="Only events of this symbol.")
@json_option
def events(
    *, follow: bool, limit: int, name: tuple[str, ...], plan: str | None, symbol: str | None, as_json: bool
) -> None:
    """Print events, oldest first. With --follow, --json gives a document a line."""

    async def work() -> int:
        from events.codec import decode  # noqa: PLC0415
        from events.types import BY_NAME  # noqa: PLC0415

        if unknown := sorted(set(name) - BY_NAME.keys()):
            raise click.BadParameter(f"{unknown[0]!r}, expected one of {', '.join(BY_NAME)}", param_hint="--name")

        def wanted(recorded: Recorded) -> bool:
            event = recorded.event
            return (
                (not name or event.NAME in name)
                and (plan is None or getattr(event, "plan_id", None) == plan)
                and (symbol is None or getattr(event, "symbol", None) == symbol)
            )

        async with _store(_settings()) as store:
            head = await store.head()
            seq = 0 if limit == 0 or name or plan or symbol else max(0, head.seq - limit)
            found = []
            while seq < head.seq and (entries := await store.read(seq, limit=5000)):
                seq = entries[-1].seq
                found += [recorded for recorded in map(decode, entries) if wanted(recorded)]
                found = found[-limit:] if limit else found
            if as_json and not follow:
                _print_json([_event(recorded) for recorded in found])
                return DONE
            while True:
                for recorded in found:
                    _print_json(_event(recorded)) if as_json else click.echo(_event_line(recorded))
                if not follow:
                    return DONE
                entries = await store.follow(seq, timeout_s=1.0)
                seq = entries[-1].seq if entries else seq
                found = [recorded for recorded in map(decode, entries) if wanted(recorded)]

    _run(work())


@main.command()
@click.argument("plan_id")
@json_option
def explain(plan_id: str, *, as_json: bool) -> None:
    """One plan's life: what was asked, what the exchange said, every check, and what became of the permit."""

    async def work() -> int:
        from events.codec import decode  # noqa: PLC0415
        from governor.explain import explain as tell  # noqa: PLC0415
        from governor.explain import lines  # noqa: PLC0415

        async with _store(_settings()) as store:
            seq, found = 0, []
            while entries := await store.read(seq, limit=5000):
                seq = entries[-1].seq
                needle = plan_id.encode()
                found += [decode(entry) for entry in entries if needle in entry.data]
        told = tell(plan_id, found)
        if as_json:
            _print_json(told)
        else:
            click.echo("\n".join(lines(told)))
        return DONE if told["known"] else FAILED

    _run(work())


@main.command(epilog=CODES)
@click.option("--at", metavar="TIME", help="Stop there: ISO 8601, unix seconds, or -2h (s, m, h, d).")
@click.option("--at-seq", type=click.IntRange(min=0), metavar="N", help="Stop after event N.")
@click.option("--expect-head", metavar="SEQ:HASH", help="A head kept elsewhere that the history must contain.")
@click.option("--all", "show_all", is_flag=True, help="List every difference, not only the first.")
@json_option
def replay(*, at: str | None, at_seq: int | None, expect_head: str | None, show_all: bool, as_json: bool) -> None:
    """Audit: decide every recorded plan again from its recorded inputs, and compare.

    Tells three verdicts apart: integrity (the hash chain), completeness (no gaps; the history contains a head that
    was kept elsewhere), agreement (every decision follows from its inputs). Writes nothing and needs no daemon. With
    --at or --at-seq the state as it was is printed as by `status`.
    """

    async def work() -> int:
        from governor import status as views  # noqa: PLC0415
        from governor.connection import now  # noqa: PLC0415
        from governor.replay import Auditor  # noqa: PLC0415

        settings = _settings()
        until = None if at is None else _moment(at, now())
        auditor = Auditor(
            key=settings.audit_key.encode() or None,
            expect=_head(expect_head),
            until_us=until,
            until_seq=at_seq,
        )
        async with _store(settings) as store:
            seq = 0
            while (entries := await store.read(seq, limit=5000)) and auditor.feed(entries):
                seq = entries[-1].seq
        found, state = auditor.finish()
        then = views.describe(state, views.policy_of(state, settings.policy), until or state.time)
        if as_json:
            _print_json(
                {name: getattr(found, name) for name in found.__struct_fields__}
                | {"head": {"seq": found.head.seq, "hash": found.head.hash}}
                | ({"status": then} if at is not None or at_seq is not None else {})
            )
        else:
            if at is not None or at_seq is not None:
                _print_status(then | {"halted": None})
            _print_replay(found, show_all=show_all)
        return DONE if found.clean else DIFFERS

    _run(work())


@main.command(epilog=CODES)
@click.option("--check", is_flag=True, help="Compare only; exit 3 when something differs.")
@json_option
def rebuild(*, check: bool, as_json: bool) -> None:
    """Write the public keys again from the events, and remove what the events do not explain.

    Never writes a permit, is safe beside a running daemon, and twice is once.
    """

    async def work() -> int:
        from governor.connection import connected, ledger_on, now  # noqa: PLC0415
        from governor.rebuild import rebuild as mend  # noqa: PLC0415

        settings = _settings(logs=True)
        async with connected(settings) as client:
            ledger = ledger_on(client, settings)
            await ledger.open()
            differences = await mend(ledger, client, now(), check=check)
        told = {
            "events": ledger.state.seq,
            "keys_written": 0 if check else len(differences),
            "differences": differences,
        }
        if as_json:
            _print_json(told)
        else:
            for difference in differences:
                click.echo(f"{difference.key}\n  expected  {difference.expected}\n  actual    {difference.actual}")
            click.echo(f"{len(differences)} differences in {told['events']} events" + ("" if check else ", all mended"))
        return DIFFERS if check and differences else DONE

    _run(work())


@main.command()
@json_option
def settings(*, as_json: bool) -> None:
    """The effective settings, secrets masked."""
    loaded = _settings()
    if as_json:
        _print_json({"settings": loaded.effective, "limits": loaded.symbol_texts, "warnings": loaded.warnings})
        return
    for name, value in loaded.effective.items():
        click.echo(f"{name}={value}")
    for symbol, limits in loaded.symbol_texts.items():
        click.echo(f"[{symbol}] " + " ".join(f"{name}={value}" for name, value in limits.items()))
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)


@main.command(epilog=CODES)
@reason_option
@json_option
def disarm(reason: str, *, as_json: bool) -> None:
    """Stop trading now: every permit dies, the Apply Layer goes to dry run and is restarted.

    Works with and without a running daemon, and without Redis too (then file and service first, the event later,
    exit 4).
    """

    async def work() -> int:
        from governor import by_hand  # noqa: PLC0415

        told = await by_hand.disarm(_settings(logs=True, stopping=True), reason=reason, operator=_operator())
        if as_json:
            _print_json(told)
        else:
            click.echo(told["message"])
        return int(told["code"])

    _run(work())


@main.command(epilog=CODES)
@reason_option
@click.option("--force", is_flag=True, help="Although a disarm is unfinished or the emergency brake is set.")
@json_option
def rearm(reason: str, *, force: bool, as_json: bool) -> None:
    """Arm again after a disarm: permits are granted from here on.

    The Apply Layer's file is left as it is: set APPLY_MODE back and restart the service when you mean to trade.
    """

    async def work() -> int:
        from governor import by_hand  # noqa: PLC0415

        told = await by_hand.rearm(_settings(logs=True), reason=reason, operator=_operator(), force=force)
        if as_json:
            _print_json(told)
        else:
            click.echo(told["message"], err=told["code"] != DONE)
        return int(told["code"])

    _run(work())


# -- what they share ---------------------------------------------------------------------------------------------


def _settings(*, logs: bool = False, stopping: bool = False) -> Settings:
    from governor.settings import SettingsError, load, load_for_stop  # noqa: PLC0415

    try:
        settings = (load_for_stop if stopping else load)(os.environ)
    except SettingsError as error:
        _fail(str(error), BAD_SETTINGS)
    if logs:
        from governor.logs import configure  # noqa: PLC0415

        configure(log_format=settings.log_format, level=settings.log_level)
    return settings


def _run(work: Coroutine[Any, Any, int]) -> NoReturn:
    from events.store import StoreError, UnavailableError  # noqa: PLC0415

    try:
        sys.exit(asyncio.run(work))
    except UnavailableError as error:
        _fail(f"Redis is not reachable: {error}", NO_REDIS)
    except StoreError as error:
        _fail(str(error), FAILED)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[RedisStore]:
    from governor.connection import connected, store_on  # noqa: PLC0415

    async with connected(settings) as client:
        yield store_on(client, settings)


def _operator() -> str:
    return os.environ.get("SUDO_USER") or getpass.getuser()


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"governor: {message}", err=True)
    sys.exit(code)


def _print_json(value: Any) -> None:
    from events.codec import dumps  # noqa: PLC0415

    click.echo(dumps(value).decode())


def _event(recorded: Recorded) -> dict[str, Any]:
    import msgspec  # noqa: PLC0415

    data = msgspec.structs.asdict(recorded.event)
    return {"seq": recorded.seq, "timestamp": recorded.at / 1e6, "event": recorded.event.NAME, "data": data}


def _event_line(recorded: Recorded) -> str:
    data = _event(recorded)["data"]
    shown = [
        f"{name}={data[name]}"
        for name in (
            "plan_id", "symbol", "action", "verdict", "reason", "computed_qty", "computed_notional", "source", "permit",
            "kind", "detail", "operator", "epoch", "action_taken", "step", "error", "count",
        )
        if data.get(name) is not None
    ]  # fmt: skip
    name = click.style(f"{recorded.event.NAME:<22}", fg=_colour(recorded.event.NAME, data.get("verdict")))
    return f"{recorded.seq:>8}  {utc(recorded.at / 1e6)}  {name} {' '.join(shown)}"


def _colour(name: str, verdict: str | None) -> str | None:
    if name in ("DISARM_STARTED", "AUTO_DISARM", "MANUAL_DISARM", "DISARM_FAILED", "UNPERMITTED_EXECUTION"):
        return "red"
    if name in ("THROTTLED", "ERROR_RECORDED", "PLAN_REJECTED", "PLAN_LOST") or verdict == "BLOCK":
        return "yellow"
    return "green" if verdict == "EXECUTE" or name in ("REARMED", "RECOVERED") else None


def _print_status(told: dict[str, Any]) -> None:
    colour = {"ARMED": "green", "THROTTLED": "yellow"}.get(told["state"], "red")
    reason = f"  ({told['reason']})" if told["reason"] else ""
    click.echo(f"{click.style(told['state'], fg=colour, bold=True)}{reason}  since {utc(told['since'])}"
               f"  epoch {told['epoch']}  event {told['seq']}")  # fmt: skip
    if told["halted"] is not None:
        click.secho(f"emergency brake: {told['halted']}", fg="red")
    if told["throttle"]:
        causes = ", ".join(f"{cause['reason']} ({cause['symbol'] or 'all'})" for cause in told["throttle"]["causes"])
        click.echo(f"throttled until {utc(told['throttle']['until'])}: {causes}")
    if told["disarm"] and not told["disarm"]["done"]:
        click.secho(
            f"DISARM UNFINISHED after {told['disarm']['attempts']} attempts: {told['disarm']['error']}", fg="red"
        )
    row = "{:<14} {:>9} {:>9} {:>22} {:>22}  {}"
    if told["symbols"]:
        click.echo(row.format("symbol", "1 h", "5 min", "USD today", "quantity today", "next allowed"))
    for symbol, values in told["symbols"].items():
        click.echo(
            row.format(
                symbol,
                *(_of(values[name]) for name in ("exec_1h", "exec_5min", "daily_notional", "daily_qty")),
                "now" if values["next_allowed"] is not None and values["next_allowed"] <= told["time"]
                else "never" if values["next_allowed"] is None else utc(values["next_allowed"]),
            )
        )  # fmt: skip
    click.echo(f"all symbols today: {_of(told['total_daily_notional'])} USD    errors: {_of(told['errors'])}    "
               f"permits outstanding: {len(told['permits'])}")  # fmt: skip
    counts = told["counts"]
    click.echo(f"plans {counts['plans']} = {counts['allowed']} allowed + {counts['blocked']} blocked + "
               f"{counts['skipped']} skipped; {counts['rejected']} rejected")  # fmt: skip


def _print_replay(found: Replay, *, show_all: bool) -> None:
    broken = found.chain
    chain = broken if isinstance(broken, str) else f"BROKEN at event {broken['broken_at']}: {broken['problem']}"
    click.echo(f"integrity     {chain}")
    click.echo(f"completeness  {'ok' if found.complete else 'THE EXPECTED HEAD IS NOT IN THE HISTORY'}")
    click.echo(f"agreement     {len(found.differences) or 'no'} differences in {found.decisions} decisions, "
               f"{found.events} events")  # fmt: skip
    for difference in found.differences if show_all else found.differences[:1]:
        click.echo(f"  event {difference.seq}  plan {difference.plan_id}  {difference.field}")
        click.echo(f"    recorded  {difference.recorded}")
        click.echo(f"    computed  {difference.computed}")
    click.echo(f"digest        {found.digest}  state {found.state}")
    click.echo(f"head          {found.head.seq}:{found.head.hash}")


def _head(text: str | None) -> Head | None:
    from events.types import Head  # noqa: PLC0415

    if text is None:
        return None
    seq, _, digest = text.partition(":")
    if not (seq.isdecimal() and digest):
        raise click.BadParameter(f"{text!r}, expected SEQ:HASH", param_hint="--expect-head")
    return Head(int(seq), digest)


def _moment(text: str, now_us: int) -> int:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        if text.startswith("-") and text[-1:] in units:
            return now_us - round(float(text[1:-1]) * units[text[-1]] * 1e6)
        try:
            return round(float(text) * 1e6)
        except ValueError:
            moment = dt.datetime.fromisoformat(text)
            return round((moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp() * 1e6)
    except ValueError:
        raise click.BadParameter(
            f"{text!r}, expected ISO 8601, unix seconds, or -2h (s, m, h, d)", param_hint="--at"
        ) from None


def _of(pair: dict[str, Any]) -> str:
    limit = pair["limit"]
    return f"{Decimal(pair['used']):f}/{'off' if limit is None else format(Decimal(limit), 'f')}"
