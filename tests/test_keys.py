import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.keys import DAY_US, Keys, date_of, day_of

NOON = int(dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC).timestamp()) * 1_000_000


def names(keys: Keys) -> list[str]:
    day = day_of(NOON)
    return [
        keys.plans,
        keys.results,
        keys.events,
        keys.state,
        keys.halt,
        keys.permit("plan-1"),
        keys.block("plan-1"),
        keys.executions("BTCUSDT"),
        keys.daily("BTCUSDT", day),
        keys.daily_qty("BTCUSDT", day),
        keys.disarm(day),
    ]


def test_with_the_default_prefix_the_names_are_those_of_the_requirement() -> None:
    assert names(Keys()) == [
        "quantum:stream:apply.plan",
        "quantum:stream:apply.result",
        "quantum:stream:governor.events",
        "quantum:governor:state",
        "quantum:governor:halt",
        "quantum:permit:plan-1",
        "quantum:governor:block:plan-1",
        "quantum:governor:exec:BTCUSDT",
        "quantum:governor:daily:BTCUSDT:2026-11-23",
        "quantum:governor:daily_qty:BTCUSDT:2026-11-23",
        "quantum:governor:disarm:2026-11-23",
    ]


def test_another_prefix_changes_the_first_part_and_nothing_else() -> None:
    assert names(Keys("{q}")) == [name.replace("quantum", "{q}", 1) for name in names(Keys())]


def test_two_units_never_share_a_key() -> None:
    assert len(set(names(Keys()))) == len(names(Keys()))


@given(st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2200, 1, 1), timezones=st.just(dt.UTC)))  # noqa: DTZ001
def test_the_date_is_the_utc_date(at: dt.datetime) -> None:
    since = at - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    micros = since // dt.timedelta(microseconds=1)
    assert date_of(day_of(micros)) == at.date().isoformat()


@pytest.mark.parametrize(
    ("at", "date"),
    [(0, "1970-01-01"), (DAY_US - 1, "1970-01-01"), (DAY_US, "1970-01-02"), (951_782_400_000_000, "2000-02-29")],
)
def test_a_day_ends_with_its_last_microsecond(at: int, date: str) -> None:
    assert date_of(day_of(at)) == date
