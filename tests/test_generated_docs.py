"""The pages of docs/ that are tables of the code: events, gates, settings."""

import ast
import inspect
from decimal import Decimal
from pathlib import Path

import pytest

from events import types
from governor import gates, policy, settings
from governor.plans import CLOSE_FRACTIONS
from tests.generated import REGENERATE, check_generated, table

WIRE = {
    "str": "string",
    "int": "number",
    "bool": "true or false",
    "Decimal": "number",
    "bool | None": "true, false or null",
    "str | None": "string or null",
    "int | None": "number or null",
    "Decimal | None": "number or null",
    "dict[str, str]": "object of strings",
    "dict[str, dict[str, str]]": "object of objects of strings",
    "dict[str, Decimal] | None": "object of numbers, or null",
    "dict[str, Any]": "object",
    "Context": "object of strings and numbers",
    "tuple[str, ...]": "list of strings",
    "tuple[Check, ...]": "list of checks, see below",
}
"""How a field's type looks in JSON."""
DEFAULTS = {"None": "null", "False": "false", "True": "true", "()": "[]", "''": '""', "'whole'": '"whole"'}
"""The same for a default."""
OTHERS = {
    "not_execute": "SKIP: the plan's decision is not `EXECUTE`. Nothing is counted and the plan_id is not used up.",
    "duplicate_plan": "SKIP: the plan_id was decided as `EXECUTE` before, whatever it got.",
    "evaluation_error": "BLOCK: something unexpected went wrong inside. Never a permit; one error.",
    "invalid_plan": "Only in block records: the entry is no plan that can be read, event `PLAN_REJECTED`; one error.",
}


def one_line(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split())


# -- events --------------------------------------------------------------------------------------------------------


def fields(cls: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """Name, type, default and docstring of each field, from the source."""
    rows = []
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        told = one_line(str(after.value.value)) if documented else ""  # type: ignore[union-attr]
        default = "" if node.value is None else f"`{DEFAULTS.get(ast.unparse(node.value), ast.unparse(node.value))}`"
        rows.append((f"`{ast.unparse(node.target)}`", WIRE[ast.unparse(node.annotation)], default, told))
    return rows


def classes() -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(types))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


HEAD = ("field", "in JSON", "if left out", "meaning")

EVENTS = """# Events

Everything that happens is appended to one Redis stream, `quantum:stream:governor.events`, and nothing is ever changed
or removed there. All else can be computed from it again: the state, the limits used up, the public keys. `governor
events` prints it, `governor explain PLAN_ID` tells one plan's story from it.

## An entry of the stream

Entry ids are `<seq>-0`. Every entry has these fields, in this order:

| field | content |
| --- | --- |
| `event` | the event's name |
| `seq` | 1, 2, 3, … without a gap |
| `timestamp` | unix seconds with six decimals |
| `data` | a JSON object, the fields below |
| `hash` | hex digest that chains this entry to the one before |

Entries named `AUTO_DISARM` also carry `reason`, `context` (JSON) and `action_taken` as plain fields, for readers with
nothing but redis-cli. They stand in `data` too.

## The hash

`hash` is the SHA-256 of these five, joined by newlines, as UTF-8 and exactly as they are stored:

```
hash of the entry before (64 zeros for the first)
event
seq
timestamp
data
```

With `GOV_AUDIT_KEY` it is the HMAC-SHA-256 of the same bytes: then nobody without the key can change an entry and make
the chain fit again. A cut-off end does not show in the chain itself; a running daemon notices that the stream ends
before an event it has seen.

## How they change

Names and fields are a promise. A field may be added, with a default. Anything else is a new version `v` of that event,
and the program reads the old ones as well. Times inside events are whole microseconds since 1970 and their names end in
`_us`. Quantities are in base units, money in USD, both exact decimals.
"""


def test_the_page_about_events_is_up_to_date() -> None:
    source = classes()
    by_class = {cls.__name__: cls for cls in types.ALL}
    overview = [(f"[`{cls.NAME}`](#{cls.NAME.lower()})", str(cls.VERSION), one_line(cls.__doc__)) for cls in types.ALL]
    sections = [
        f"\n### {by_class[name].NAME}\n\n{one_line(by_class[name].__doc__)}\n\n"
        + (table(HEAD, fields(source[name])) if fields(source[name]) else "No fields beside `v`.\n")
        for name in by_class
    ]
    check_generated(
        "docs/events.md",
        EVENTS
        + "\n## All events\n\n"
        + table(("event", "version", "meaning"), overview)
        + "\nEvery `data` also has `v`, the version.\n"
        + "".join(sections)
        + f"\n### A check\n\n{one_line(types.Check.__doc__)} The names are those of [gates.md](gates.md).\n\n"
        + table(HEAD, fields(source["Check"]))
        + "\nThis page is written from `events/types.py` by its test.\n",
    )


def test_every_event_says_what_it_means() -> None:
    for cls in types.ALL:
        assert one_line(cls.__doc__).endswith(".")
        assert cls.NAME.upper() == cls.NAME


def test_the_names_of_the_events_are_those_of_the_contract() -> None:
    assert " ".join(cls.NAME for cls in types.ALL) == (
        "PLAN_RECEIVED PLAN_REJECTED PLAN_LOST DECISION PERMIT_CONSUMED PERMIT_EXPIRED PERMIT_REVOKED EXECUTION "
        "UNPERMITTED_EXECUTION ERROR_RECORDED THROTTLED RECOVERED DISARM_STARTED AUTO_DISARM MANUAL_DISARM "
        "DISARM_FAILED REARMED SETTINGS_LOADED HISTORY_RESTORED HISTORY_ACCEPTED "
        "APPLY_MODE_DRIFTED DRIFT_ENDED APPLY_MODE_RESTORED"
    )


# -- gates ---------------------------------------------------------------------------------------------------------

GATES = """# Gates

Every plan with the decision `EXECUTE` goes through these gates. All of them are looked at and recorded in the event
`DECISION`; the first one that fails, in this order, is the reason for the block. A check has one of three answers:
`true` (passed), `false` (failed), `null` (could not be evaluated, or does not concern this plan; it never blocks by
itself).
`governor explain PLAN_ID` shows them for one plan.

A limit of N blocks the execution N+1. A daily total may reach its limit, not pass it. Zero means that nothing is
allowed; `off` switches a limit off. Windows hold what is strictly younger than they are long. Days are UTC days.

"""
AFTER_GATES = """
The exchange is asked only when gates 1 to {last} pass. `UPDATE_SL` moves no quantity and never needs it; without
credentials it is never asked, and the quantity is the plan's `close_qty`, else `GOV_FALLBACK_QTY`.

`UPDATE_SL` has an hour and a five-minute window of its own, with the same limits; they block and lead to nothing more.

"""


def test_the_page_about_the_gates_is_up_to_date() -> None:
    rows = [
        (
            str(number),
            ", ".join(f"`{name}`" for name in row.names),
            ", ".join(f"`{reason}`" for reason in row.reasons),
            one_line(row.gate.__doc__),
        )
        for number, row in enumerate(gates.TABLE, 1)
    ]
    closes = [(f"`{action}`", f"{fraction * 100:.0f} %") for action, fraction in CLOSE_FRACTIONS.items()]
    check_generated(
        "docs/gates.md",
        GATES
        + table(("#", "check", "reason when it fails", "about"), rows)
        + AFTER_GATES.format(last=gates.MARKET_FROM)
        + "## Other reasons\n\n"
        + table(("reason", "meaning"), [(f"`{name}`", OTHERS[name]) for name in gates.OTHER_REASONS])
        + "\n## Actions\n\nThe CLOSE actions and what they close of the position:\n\n"
        + table(("action", "quantity"), [*closes, (f"`{gates.UPDATE_SL}`", "none (not a CLOSE action)")])
        + "\nAny other action is blocked. This page is written from `governor/gates.py` by its test.\n",
    )


def test_every_reason_is_explained_once() -> None:
    assert set(OTHERS) == set(gates.OTHER_REASONS)
    assert all(fraction <= Decimal(1) for fraction in CLOSE_FRACTIONS.values())


# -- settings ------------------------------------------------------------------------------------------------------

SETTINGS = """# Settings

All settings are environment variables, read once at the start. Under systemd they stand in `/etc/quantum/governor.env`.
`governor settings` prints the ones in force, with secrets masked.

A value that cannot be used ends the start with exit code 78 and a line that names the variable, its value and what is
allowed. An unknown name that begins with `GOV_` is warned about. An empty value is an error, except where the default
is empty. `off` switches a limit off; zero means that nothing is allowed.

"""
AFTER_SETTINGS = """
## Limits of single symbols

0.02 BTC is a limit, 0.02 DOGE is none. The file named by `GOV_LIMITS_FILE` holds one table a symbol, with those of
these variables that differ: {names}.

```toml
[DOGEUSDT]
GOV_MAX_REDUCE_QTY_PER_DAY = "50000"
```

Every start records the settings that take part in decisions, `SETTINGS_LOADED`, so a replay decides each plan
under the settings of its time. This page is written from `governor/settings.py` by its test.
"""


def allowed(row: settings.Row) -> str:
    """What a wrong value is told."""
    readers = policy.SYMBOL_NAMES | policy.NAMES
    read = readers[row.name][1] if row.name in readers else row.read
    try:
        read(" ")
    except ValueError as problem:
        return str(problem)
    return ""


def test_the_page_about_the_settings_is_up_to_date() -> None:
    rows = [
        (
            f"`{row.name}`",
            f"`{row.default}`" if row.default else "",
            allowed(row),
            row.help + (" Secret." if row.secret else ""),
        )
        for row in settings.TABLE
    ]
    names = ", ".join(f"`{name}`" for name in policy.SYMBOL_NAMES)
    check_generated(
        "docs/settings.md",
        SETTINGS + table(("variable", "default", "allowed", "meaning"), rows) + AFTER_SETTINGS.format(names=names),
    )


def test_the_settings_of_the_policy_have_the_same_defaults_in_both_places() -> None:
    defaults = {row.name: row.default for row in settings.TABLE}
    assert {name: defaults.get(name) for name in policy.DEFAULTS if name != "credentials"} == {
        name: text for name, text in policy.DEFAULTS.items() if name != "credentials"
    }


# -- the helper ----------------------------------------------------------------------------------------------------


def test_a_stale_page_fails_and_is_written_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.generated.ROOT", tmp_path)
    monkeypatch.delenv(REGENERATE, raising=False)
    with pytest.raises(AssertionError, match=r"docs/x\.md is stale"):
        check_generated("docs/x.md", "one\n")
    monkeypatch.setenv(REGENERATE, "1")
    check_generated("docs/x.md", "one\n")
    monkeypatch.delenv(REGENERATE)
    check_generated("docs/x.md", "one\n")
    with pytest.raises(AssertionError, match=r"docs/x\.md is stale"):
        check_generated("docs/x.md", "two\n")


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table(("a", "b"), [("x | y", "z")]) == "| a | b |\n| --- | --- |\n| x \\| y | z |\n"
