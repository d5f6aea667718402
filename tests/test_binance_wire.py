"""Addresses, signatures, recorded answers and the error table, without a network."""

import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from governor.binance import ERROR_KINDS, ExchangeError, sign
from governor.binance_errors import Breaker, refusal, safe_text
from governor.binance_wire import MARK, MARKS, POSITION_V2, TIME, mark_price, position_legs
from governor.hosts import check_base_url

DATA = Path(__file__).parent / "data" / "binance"
VECTORS: list[dict[str, Any]] = json.loads((DATA / "signing" / "vectors.json").read_bytes())
ERRORS: list[dict[str, Any]] = json.loads((DATA / "errors" / "errors.json").read_bytes())
NOW_MS = 1_600_000_000_000


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_signatures_match_the_official_examples(vector: dict[str, str]) -> None:
    assert sign(vector["secret"], vector["payload"]) == vector["signature"]


def test_both_official_query_string_examples_are_among_the_vectors() -> None:
    names = {vector["name"] for vector in VECTORS}
    assert {"futures_query_string_official", "spot_query_string_official"} <= names


def test_the_misprinted_example_has_a_space_after_timestamp() -> None:
    vector = next(one for one in VECTORS if one["name"] == "futures_mixed_query_body_recomputed")
    printed = "f9d0ae5e813ef6ccf15c2b5a434047a0181cb5a342b903b367ca6d27a66e36f2"
    assert sign(vector["secret"], vector["payload"].replace("timestamp=", "timestamp= ")) == printed


def test_a_refused_address_shows_no_password() -> None:
    with pytest.raises(ValueError, match="evil") as refused:
        check_base_url("https://me:hunter2@evil.example/?signature=abc", allow_mainnet=False)
    assert "hunter2" not in str(refused.value)
    assert "abc" not in str(refused.value)


def legs(body: bytes, symbol: str, *, v3: bool = False) -> dict[str, Decimal] | str:
    """Legs, or why there are none, as the client reads a position answer."""
    if refused := refusal(200, {}, body, NOW_MS):
        return refused.kind
    try:
        return position_legs(POSITION_V2.decoder.decode(body), symbol, none_is_flat=v3)
    except (ExchangeError, msgspec.DecodeError) as error:
        return error.kind if isinstance(error, ExchangeError) else "bad_response"


def price(body: bytes, symbol: str) -> Decimal | str:
    """Mark price, or why there is none, as the client reads an answer for one symbol."""
    if refused := refusal(200, {}, body, NOW_MS):
        return refused.kind
    try:
        return mark_price(MARK.decoder.decode(body), symbol)
    except (ExchangeError, msgspec.DecodeError) as error:
        return error.kind if isinstance(error, ExchangeError) else "bad_response"


BAD = "bad_response"
D = Decimal
RECORDED: Mapping[str, tuple[str, dict[str, Decimal] | str, Decimal | str]] = {
    # file: symbol, what it says as a position, what it says as a mark price
    "positionRisk_v2/hedge_BTCUSDT_long0.001_short0__recorded_jkorf.json": (
        "BTCUSDT",
        {"LONG": D("0.001"), "SHORT": D(0)},
        BAD,
    ),
    "positionRisk_v2/oneway_BTCUSDT_flat__doc_jkorf.json": ("BTCUSDT", {"BOTH": D(0)}, BAD),
    "positionRisk_v3/empty_flat_account__reported_node919.json": ("BTCUSDT", BAD, BAD),
    "positionRisk_v3/hedge_1000SATSUSDT_scientific_notation__recorded_ccxt_stringified.json": (
        "1000SATSUSDT",
        {"LONG": D(24991)},
        BAD,
    ),
    "positionRisk_v3/hedge_ADAUSDT_long_COMPUSDT_short_one_leg_each__doc.json": (
        "COMPUSDT",
        {"SHORT": D(-1)},
        BAD,
    ),
    "positionRisk_v3/oneway_ADAUSDT_long30__doc_connector.json": ("ADAUSDT", {"BOTH": D(30)}, BAD),
    "positionRisk_v3/oneway_BTCUSDT_long0.009__normalised.json": ("BTCUSDT", {"BOTH": D("0.009")}, BAD),
    "positionRisk_v3/oneway_BTCUSDT_long0.009__recorded_ccxt_stringified.json": (
        "BTCUSDT",
        {"BOTH": D("0.009")},
        BAD,
    ),
    "positionRisk_v3/oneway_BTCUSDT_long0.009_later_mark__recorded_ccxt_stringified.json": (
        "BTCUSDT",
        {"BOTH": D("0.009")},
        BAD,
    ),
    # COIN-M answers a list even for one symbol: never a price here.
    "premiumIndex/dapi_single_is_a_list_BTCUSD_PERP__recorded_gct.json": ("BTCUSD_PERP", BAD, BAD),
    "premiumIndex/single_BTCUSDT_2023__recorded_gct.json": ("BTCUSDT", BAD, D("26780.82240476")),
    "time/serverTime__recorded_gct.json": ("BTCUSDT", BAD, BAD),
    "other/dapi_positionRisk_BTCUSD_PERP_short3_and_flat__recorded_ccxt_stringified.json": (
        "BTCUSD_PERP",
        {"BOTH": D(-3)},
        BAD,
    ),
    "other/fapi_ticker_price_all_2020__recorded_gct.json": ("BTCUSDT", BAD, BAD),
    "other/positionSide_dual_false_testnet__recorded_ccxt21395.json": ("BTCUSDT", BAD, BAD),
    "ws/account_update_BTCUSDT_BOTH5_LONG0_SHORT0__recorded_jkorf546.json": ("BTCUSDT", BAD, BAD),
    "ws/account_update_CHZUSDT_hedge_BOTH0_LONG2684__recorded_unicornfy.json": ("CHZUSDT", BAD, BAD),
    "ws/markPriceUpdate_BTCUSDT_2021-12-21__recorded_futures_connector_pr5.json": ("BTCUSDT", BAD, BAD),
    "klines/fapi_BTCUSDT_1d_6_2023-01__recorded_gct.json": ("BTCUSDT", BAD, BAD),
    "errors/errors.json": ("BTCUSDT", BAD, BAD),
    "signing/vectors.json": ("BTCUSDT", BAD, BAD),
}


def test_every_recorded_file_is_looked_at() -> None:
    found = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*.json")}
    assert found == set(RECORDED)


@pytest.mark.parametrize("file", RECORDED)
def test_a_recorded_file_decodes_or_is_refused(file: str) -> None:
    symbol, expected_legs, expected_price = RECORDED[file]
    body = (DATA / file).read_bytes()
    assert legs(body, symbol) == expected_legs
    assert price(body, symbol) == expected_price


@pytest.mark.parametrize("file", [name for name in RECORDED if name.startswith("positionRisk")])
def test_a_symbol_that_is_not_in_the_file_is_never_flat(file: str) -> None:
    body = (DATA / file).read_bytes()
    assert legs(body, "XRPUSDT") == BAD
    if "empty" in file:
        assert legs(body, "XRPUSDT", v3=True) == {"BOTH": D(0)}
    else:
        assert legs(body, "XRPUSDT", v3=True) == BAD


def test_the_recorded_time_decodes() -> None:
    body = (DATA / "time" / "serverTime__recorded_gct.json").read_bytes()
    assert TIME.decoder.decode(body).server_time == 1_620_099_477_465


def test_a_list_of_marks_decodes_without_the_optional_fields() -> None:
    body = (DATA / "premiumIndex" / "dapi_single_is_a_list_BTCUSD_PERP__recorded_gct.json").read_bytes()
    (mark,) = MARKS.decoder.decode(body)
    assert mark_price(mark, "BTCUSD_PERP") == D("26780.20000000")
    assert MARKS.decoder.decode(b'[{"symbol":"A","markPrice":"1"}]')[0].time is None


def rows(*found: tuple[str, str, str]) -> bytes:
    return msgspec.json.encode(
        [{"symbol": symbol, "positionSide": side, "positionAmt": amt} for symbol, side, amt in found]
    )


def test_the_first_row_is_not_simply_taken() -> None:
    body = rows(("ETHUSDT", "BOTH", "7"), ("BTCUSDT", "BOTH", "-0.5"))
    assert legs(body, "BTCUSDT") == {"BOTH": D("-0.5")}


@pytest.mark.parametrize(
    "body",
    [
        rows(("BTCUSDT", "BOTH", "1"), ("BTCUSDT", "BOTH", "1")),
        rows(("BTCUSDT", "LONG", "1"), ("BTCUSDT", "LONG", "0")),
        rows(("BTCUSDT", "BOTH", "1"), ("BTCUSDT", "LONG", "1")),
        rows(("BTCUSDT", "SIDEWAYS", "1")),
        rows(("btcusdt", "BOTH", "1")),
        b"[]",
        b"{}",
        b"null",
        b'"flat"',
        b"",
        b"[",
        b"[null]",
        b'[{"symbol":"BTCUSDT"}]',
        b'[{"symbol":"BTCUSDT","positionAmt":1}]',
        b'[{"symbol":"BTCUSDT","positionAmt":null}]',
        b'[{"symbol":"BTCUSDT","positionAmt":"1"}',
        b'\xef\xbb\xbf[{"symbol":"BTCUSDT","positionAmt":"1"}]',
    ],
)
def test_a_position_that_is_not_proved_is_refused(body: bytes) -> None:
    assert legs(body, "BTCUSDT") == BAD


def test_a_one_way_row_beside_empty_hedge_rows_counts() -> None:
    body = rows(("BTCUSDT", "BOTH", "5"), ("BTCUSDT", "LONG", "0"), ("BTCUSDT", "SHORT", "0.000"))
    assert legs(body, "BTCUSDT") == {"BOTH": D(5), "LONG": D(0), "SHORT": D(0)}


NOT_NUMBERS = ["NaN", "sNaN", "Infinity", "-Infinity", "inf", " 1", "1 ", "1_000", "1,5", "", "٣", "0x1", "1e99999"]
NOT_NUMBERS += ["1E31", "1E-31", "1" * 39, "--1", "1\n", "1e"]


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    assert legs(rows(("BTCUSDT", "BOTH", text)), "BTCUSDT") == BAD
    assert price(msgspec.json.encode({"symbol": "BTCUSDT", "markPrice": text}), "BTCUSDT") == BAD


@pytest.mark.parametrize(("text", "value"), [("2.8E-4", "0.00028"), ("1.0E7", "10000000"), ("1e+2", "100")])
def test_scientific_notation_is_read(text: str, value: str) -> None:
    assert price(msgspec.json.encode({"symbol": "A", "markPrice": text}), "A") == D(value)
    assert legs(rows(("A", "SHORT", f"-{text}")), "A") == {"SHORT": -D(value)}


@pytest.mark.parametrize("text", ["0", "0.00000000", "-1", "-0.00000001"])
def test_a_price_is_above_zero(text: str) -> None:
    assert price(msgspec.json.encode({"symbol": "A", "markPrice": text}), "A") == BAD


def test_the_price_of_another_symbol_is_refused() -> None:
    assert price(b'{"symbol":"B","markPrice":"1"}', "A") == BAD
    assert price(b'{"markPrice":"1"}', "A") == BAD


def test_half_an_answer_never_becomes_a_position() -> None:
    good = (DATA / "positionRisk_v2" / "oneway_BTCUSDT_flat__doc_jkorf.json").read_bytes()
    for cut in range(len(good.rstrip())):
        assert legs(good[:cut], "BTCUSDT") == BAD
    assert legs(b"[" * 100_000, "BTCUSDT") == BAD


KINDS = {
    "invalid_symbol": "bad_symbol",
    "api_key_format_invalid": "auth",
    "rejected_mbx_key": "auth",
    "invalid_api_key_id_wrong_environment": "auth",
    "timestamp_ahead": "clock",
    "timestamp_outside_recvwindow": "clock",
    "invalid_signature": "auth",
    "ip_banned_weight": "banned",
    "ip_banned_requests_on_positionRisk": "banned",
    "too_many_requests": "rate_limited",
    "unknown_503_status_unknown": "server_error",
    "service_unavailable_503": "server_error",
    "internal_error_503": "server_error",
    "throttled_503": "overloaded",
    "timeout_408": "server_timeout",
    "retired_endpoint_HTTP_200": "retired",
    "max_interval": "bad_request",
    "reduce_only_conflict_min_notional": "bad_request",
    "waf_403_html": "waf_blocked",
}
UNREADABLE = {"testnet_waf_challenge_202", "testnet_200_non_json"}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error["name"])
def test_each_recorded_error_has_its_kind(error: dict[str, Any]) -> None:
    body = error["body_text"].encode() if error["body"] is None else msgspec.json.encode(error["body"])
    headers = {name.lower(): value for name, value in error["headers"].items()}
    found = refusal(error["http_status"] or 400, headers, body, NOW_MS)
    if error["name"] in UNREADABLE:
        assert found is None
        with pytest.raises(msgspec.DecodeError):
            POSITION_V2.decoder.decode(body)
        return
    assert found is not None
    assert found.kind == KINDS[error["name"]]
    assert found.kind in ERROR_KINDS
    assert found.status == (error["http_status"] or 400)
    assert found.code == (error["body"] or {}).get("code")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"code":-2008,"msg":"Invalid Api-Key ID"}', "auth"),
        (400, b'{"code":-1002,"msg":"You are not authorized to execute this request."}', "auth"),
        (401, b"", "auth"),
        (403, b'{"code":-2015,"msg":"x"}', "auth"),
        (403, b"{}", "waf_blocked"),
        (200, b'{"code":-2015,"msg":"x"}', "auth"),
        (400, b'{"code":-1003,"msg":"Too many requests"}', "rate_limited"),
        (429, b"", "rate_limited"),
        (429, b'{"code":-1121,"msg":"x"}', "rate_limited"),
        (429, b'{"code":-1003,"msg":"IP banned until 1700000000000."}', "banned"),
        (418, b"<html>", "banned"),
        (400, b'{"code":-1006,"msg":"x"}', "server_timeout"),
        (200, b'{"code":-1007,"msg":"x"}', "server_timeout"),
        (503, b'{"code":-1007,"msg":"x"}', "server_timeout"),
        (408, b"", "server_timeout"),
        (500, b"oops", "server_error"),
        (502, b"<html>", "server_error"),
        (503, b'{"code":-1008,"msg":"x"}', "overloaded"),
        (504, b'{"code":0,"msg":"x"}', "server_error"),
        (400, b'{"code":-1122,"msg":"x"}', "bad_symbol"),
        *((400, b'{"code":%d,"msg":"x"}' % code, "bad_request") for code in range(-1106, -1099)),
        (404, b"", "retired"),
        (301, b"", "bad_response"),
        (100, b"", "bad_response"),
        (200, b'{"code":-99999}', "bad_response"),
        (400, b'{"code":"-1121","msg":7}', "bad_request"),
        (400, b'{"code":', "bad_request"),
        (400, b"\xff\xfe{", "bad_request"),
    ],
)
def test_the_error_table(status: int, body: bytes, kind: str) -> None:
    found = refusal(status, {}, body, NOW_MS)
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"symbol":"A"}', b'{"code":200,"msg":"success"}', b"", b"111 107"])
def test_a_2xx_without_an_error_code_is_left_to_its_shape(body: bytes) -> None:
    assert refusal(200, {}, body, NOW_MS) is None


@pytest.mark.parametrize(
    ("told", "wait_s"),
    [("7", 7.0), ("0", None), ("99999999999999", 259_200.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None)],
)
def test_retry_after_is_taken_in_seconds_and_bounded(told: str, wait_s: float | None) -> None:
    found = refusal(429, {"retry-after": told}, b"", NOW_MS)
    assert found is not None
    assert found.wait_s == wait_s


def test_the_end_of_a_ban_is_read_from_its_text() -> None:
    body = b'{"code":-1003,"msg":"Way too many requests; IP banned until %d."}' % (NOW_MS + 90_000)
    for headers, wait_s in (({}, 91.0), ({"retry-after": "120"}, 120.0), ({"retry-after": "5"}, 91.0)):
        found = refusal(418, headers, body, NOW_MS)
        assert found is not None
        assert found.wait_s == wait_s
    over = refusal(418, {}, body, NOW_MS + 100_000)
    assert over is not None
    assert over.wait_s is None


def pause_s(breaker: Breaker, kind: str, now_us: int, wait_s: float | None = None) -> float:
    breaker.trip(ExchangeError(kind, wait_s=wait_s), now_us)
    return (breaker.until_us - now_us) / 1e6


@pytest.mark.parametrize(
    ("kind", "pauses"),
    [
        ("rate_limited", [5, 10, 20, 40, 40]),
        ("waf_blocked", [60, 120, 240, 480, 480]),
        ("banned", [120, 240, 480, 960, 1920]),
        ("auth", [60, 60, 60]),
    ],
)
def test_pauses_double_until_their_longest(kind: str, pauses: list[int]) -> None:
    breaker, now_us = Breaker(), 10**15
    for expected in pauses:
        assert expected <= pause_s(breaker, kind, now_us) <= expected * 1.1
        now_us = breaker.until_us
    breaker.good(now_us)
    assert pauses[0] <= pause_s(breaker, kind, now_us) <= pauses[0] * 1.1
    for _ in range(2000):
        now_us = breaker.until_us
        pause_s(breaker, kind, now_us)


def test_the_exchanges_own_wait_counts_but_a_firewall_gets_its_minute() -> None:
    assert pause_s(Breaker(), "rate_limited", 10**15, wait_s=3.0) == 3.0
    assert pause_s(Breaker(), "banned", 10**15, wait_s=3600.0) == 3600.0
    assert pause_s(Breaker(), "waf_blocked", 10**15, wait_s=3.0) == 60.0


def test_refusals_of_calls_sent_together_are_one_strike_and_the_longest_wait_counts() -> None:
    breaker = Breaker()
    for wait_s in (None, 30.0, 8.0, None):
        breaker.trip(ExchangeError("rate_limited", wait_s=wait_s), 10**15)
    assert (breaker.strikes, breaker.opened) == (1, 1)
    assert breaker.until_us == 10**15 + 30_000_000
    breaker.good(10**15)
    assert breaker.strikes == 1, "an answer that was on its way says nothing about the stop"
    with pytest.raises(ExchangeError, match="rate_limited: held back for 30 s more"):
        breaker.check(10**15)


def test_the_text_of_an_error_is_short_and_holds_nothing_secret() -> None:
    key = "a1" * 32
    error = ExchangeError("auth", f"bad key {key}\n\x1b[31m&signature=deadbeef&x " + "y " * 500, code=-2015, status=401)
    assert str(error).startswith("auth: status 401, code -2015: bad key *** ")
    for text in (str(error), repr(error), error.detail):
        assert key not in text
        assert "deadbeef" not in text
        assert "\x1b" not in text
        assert "\n" not in text
    assert len(error.detail) <= 200
    assert len(safe_text("x y" * 10**6)) == 200


def test_kinds_are_a_closed_set_of_plain_words() -> None:
    assert len(set(ERROR_KINDS)) == len(ERROR_KINDS)
    assert all(kind.replace("_", "").isalpha() and kind.islower() for kind in ERROR_KINDS)
    assert set(KINDS.values()) <= set(ERROR_KINDS)
