"""Limits from texts, as the environment and the recorded settings have them."""

from decimal import Decimal
from typing import Any

import pytest

from governor import policy
from governor.policy import DEFAULTS, NAMES, SYMBOL_NAMES, Limits, Policy, digest, from_texts, shown


def test_the_defaults_are_those_of_the_contract() -> None:
    assert from_texts({}) == Policy()
    assert Policy() == Policy(
        limits=Limits(per_hour=3, per_5min=2, notional_per_day=Decimal(5000), qty_per_day=Decimal("0.02")),
        by_symbol={},
        total_notional_per_day=None,
        kill_score_critical=Decimal("0.8"),
        max_plan_age_us=60_000_000,
        permit_ttl_us=60_000_000,
        fallback_qty=None,
        credentials=False,
        auto_disarm=True,
        disarm_on_burst=True,
        disarm_on_unpermitted=True,
        disarm_on_errors=5,
        error_window_us=3_600_000_000,
        throttle_cooldown_us=300_000_000,
        throttle_per_5min=1,
    )


def test_every_name_has_a_default_and_a_field() -> None:
    assert set(DEFAULTS) == set(NAMES) | set(SYMBOL_NAMES)
    assert {field for field, _ in SYMBOL_NAMES.values()} == set(Limits.__struct_fields__)
    assert {field for field, _ in NAMES.values()} == set(Policy.__struct_fields__) - {"limits", "by_symbol"}


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD", "10000.50", "total_notional_per_day", Decimal("10000.5")),
        ("GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD", "0", "total_notional_per_day", Decimal(0)),
        ("GOV_KILL_SCORE_CRITICAL", "off", "kill_score_critical", None),
        ("GOV_MAX_PLAN_AGE_SEC", "0.5", "max_plan_age_us", 500_000),
        ("GOV_MAX_PLAN_AGE_SEC", "off", "max_plan_age_us", None),
        ("GOV_PERMIT_TTL_SEC", "2", "permit_ttl_us", 2_000_000),
        ("GOV_FALLBACK_QTY", "0.01", "fallback_qty", Decimal("0.01")),
        ("GOV_FALLBACK_QTY", "", "fallback_qty", None),
        ("GOV_ENABLE_AUTO_DISARM", "False", "auto_disarm", False),
        ("GOV_DISARM_ON_ERROR_COUNT", "off", "disarm_on_errors", None),
        ("GOV_DISARM_ON_ERROR_COUNT", "0", "disarm_on_errors", 0),
        ("GOV_ERROR_WINDOW_SEC", "86400", "error_window_us", 86_400_000_000),
        ("GOV_THROTTLE_MAX_EXEC_PER_5MIN", "off", "throttle_per_5min", None),
        ("credentials", "true", "credentials", True),
    ],
)
def test_a_setting_is_read(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(from_texts({name: text}), field) == value


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("GOV_MAX_EXEC_PER_HOUR", "0", "per_hour", 0),
        ("GOV_MAX_EXEC_PER_HOUR", "off", "per_hour", None),
        ("GOV_MAX_EXEC_PER_5MIN", "100000", "per_5min", 100_000),
        ("GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD", "1e4", "notional_per_day", Decimal(10000)),
        ("GOV_MAX_REDUCE_QTY_PER_DAY", "off", "qty_per_day", None),
    ],
)
def test_a_limit_of_every_symbol_is_read(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(from_texts({name: text}).of("ANY"), field) == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("GOV_MAX_EXEC_PER_HOUR", "-1", "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_EXEC_PER_HOUR", "2.0", "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_EXEC_PER_HOUR", "", "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_EXEC_PER_HOUR", "Off", "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_EXEC_PER_HOUR", "٣", "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_EXEC_PER_5MIN", "100001", "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_EXEC_PER_5MIN", "9" * 5000, "a whole number from 0 to 100000 or off"),
        ("GOV_MAX_REDUCE_QTY_PER_DAY", "nan", "a number of at least 0 or off"),
        ("GOV_MAX_REDUCE_QTY_PER_DAY", "-0.1", "a number of at least 0 or off"),
        ("GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD", "", "a number of at least 0 or off"),
        ("GOV_KILL_SCORE_CRITICAL", "inf", "a number of at least 0 or off"),
        ("GOV_MAX_PLAN_AGE_SEC", "86401", "seconds from 0 to 86400 or off"),
        ("GOV_PERMIT_TTL_SEC", "off", "seconds from 2 to 3600"),
        ("GOV_PERMIT_TTL_SEC", "1.9", "seconds from 2 to 3600"),
        ("GOV_PERMIT_TTL_SEC", "soon", "seconds from 2 to 3600"),
        ("GOV_FALLBACK_QTY", "0", "a number above 0, or empty"),
        ("GOV_FALLBACK_QTY", "-1", "a number above 0, or empty"),
        ("GOV_FALLBACK_QTY", "off", "a number above 0, or empty"),
        ("GOV_ENABLE_AUTO_DISARM", "yes", "true or false"),
        ("GOV_ENABLE_AUTO_DISARM", "", "true or false"),
        ("GOV_DISARM_ON_ERROR_COUNT", "1001", "a whole number from 0 to 1000 or off"),
        ("GOV_THROTTLE_COOLDOWN_SEC", "0", "seconds from 1 to 86400"),
    ],
)
def test_a_wrong_value_names_the_variable_the_value_and_what_is_allowed(name: str, text: str, allowed: str) -> None:
    with pytest.raises(ValueError) as problem:  # noqa: PT011 - the whole message is compared
        from_texts({name: text})
    assert str(problem.value) == f"{name} is {text!r}, expected {allowed}"


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_allowed_is_known_of_every_name(name: str) -> None:
    readers = SYMBOL_NAMES if name in SYMBOL_NAMES else NAMES
    with pytest.raises(ValueError, match=rf"^{name} is '\\x00', expected (a|seconds|true)"):
        policy.read(name, "\0", readers)


def test_names_that_are_no_limits_are_left_to_others() -> None:
    assert from_texts({"REDIS_HOST": "x", "GOV_SOMETHING": "y"}) == Policy()


def test_a_symbol_can_have_limits_of_its_own_and_keeps_the_others() -> None:
    found = from_texts(
        {"GOV_MAX_EXEC_PER_HOUR": "9"}, {"DOGEUSDT": {"GOV_MAX_REDUCE_QTY_PER_DAY": "50000"}, "XRPUSDT": {}}
    )
    assert found.of("DOGEUSDT") == Limits(per_hour=9, qty_per_day=Decimal(50000))
    assert found.of("XRPUSDT") == found.of("BTCUSDT") == found.limits == Limits(per_hour=9)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"GOV_MAX_EXEC_PER_HOUR": "many"}, "GOV_MAX_EXEC_PER_HOUR is 'many', expected a whole number"),
        ({"GOV_MAX_EXEC_PER_HOUR": ""}, "GOV_MAX_EXEC_PER_HOUR is '', expected a whole number"),
        ({"GOV_KILL_SCORE_CRITICAL": "1"}, "'GOV_KILL_SCORE_CRITICAL' is no limit, expected one of GOV_MAX_EXEC_PER"),
    ],
)
def test_a_wrong_limit_of_a_symbol_names_the_symbol(texts: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^limits of DOGEUSDT: {message}"):
        from_texts({}, {"DOGEUSDT": texts})


def test_the_digest_names_a_set_of_settings_whatever_their_order() -> None:
    one = digest({"a": "1", "b": "2"}, {"X": {"c": "3", "d": "4"}})
    assert one == digest({"b": "2", "a": "1"}, {"X": {"d": "4", "c": "3"}})
    assert one != digest({"a": "1", "b": "3"}, {"X": {"c": "3", "d": "4"}})
    assert one != digest({"a": "1", "b": "2"}, {"X": {"c": "3"}})
    assert len(one) == 16


def test_a_limit_is_shown_as_it_is_written() -> None:
    assert [shown(number) for number in (None, 3, Decimal("0.020"), Decimal("1E+3"))] == ["off", "3", "0.02", "1000"]
