from decimal import Context, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.decimals import MAX_DIGITS, MAX_EXPONENT, ZERO, notional, parse, plain, product, text, total

PRICES = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**18), max_value=10**18, places=12)
DIGITS = st.integers(-(10**MAX_DIGITS - 1), 10**MAX_DIGITS - 1)


def wide(digits: int, magnitude: int) -> Decimal:
    """A number `parse` still lets in, with its first digit at 10^magnitude."""
    return Decimal((int(digits < 0), tuple(map(int, str(abs(digits)))), magnitude - len(str(abs(digits))) + 1))


WIDE = st.builds(wide, DIGITS, st.integers(-MAX_EXPONENT, MAX_EXPONENT))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("0", "0"),
        ("-0", "0"),
        ("0.000", "0"),
        ("0e9999", "0"),
        ("1", "1"),
        ("+1", "1"),
        ("-1.50", "-1.5"),
        ("1.", "1"),
        (".5", "0.5"),
        ("007", "7"),
        ("2.8E-4", "0.00028"),
        ("1.0E7", "10000000"),
        ("1e+3", "1000"),
        ("9e-30", "9e-30"),
        ("9e30", "9e30"),
        ("1" * 20 + "." + "1" * 18, "1" * 20 + "." + "1" * 18),
    ],
)
def test_a_number_is_read_as_clients_and_exchanges_write_it(written: str, number: str) -> None:
    assert parse(written) == Decimal(number)


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        " 1",
        "1 ",
        "1\n",
        "\t1",
        "1_000",
        "1,5",
        "NaN",
        "nan",
        "sNaN",
        "Infinity",
        "-inf",
        "0x10",
        "1e",
        "e5",
        "1e5.5",
        "--1",
        ".",
        "+",
        "-.e1",
        "1e400",
        "1e-400",
        "1e99999",
        "1e31",
        "9e-31",
        "1" * (MAX_DIGITS + 1),
        "0." + "1" * (MAX_DIGITS + 1),
        "9" * 5000,
        "0" * 5000,
        "1e" + "0" * 5000,
        "\u0661",
        "\uff11",
        "1\u066b5",
        "\u22121",
        "½",
        "1\x00",
        "0e99999",
        "True",
        "None",
    ],
    ids=lambda written: ascii(written)[:20],
)
def test_anything_else_is_refused_and_shown_shortened(written: str) -> None:
    with pytest.raises(ValueError, match=r"no finite decimal number|more digits") as caught:
        parse(written)
    assert len(str(caught.value)) < 100
    assert repr(written[:40]) in str(caught.value)


@given(WIDE)
def test_every_number_within_bounds_is_read_exactly(number: Decimal) -> None:
    written = str(number)
    assert Fraction(parse(written)) == Fraction(number)


@given(st.text(max_size=100) | st.text("0123456789.eE+-_ ", max_size=12))
def test_any_text_is_a_number_or_refused(written: str) -> None:
    try:
        number = parse(written)
    except ValueError:
        return
    assert number.is_finite()
    assert Fraction(number) == Fraction(written)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-20, max_value=1e20))
def test_numbers_as_python_and_javascript_write_them_are_read(value: float) -> None:
    assert float(parse(repr(value))) == value


# ---------------------------------------------------------------- writing


@given(WIDE)
def test_plain_is_the_same_number_and_equals_look_equal(number: Decimal) -> None:
    shown = plain(number)
    assert Fraction(shown) == Fraction(number)
    more = Decimal((number.as_tuple().sign, (*number.as_tuple().digits, 0), int(number.as_tuple().exponent) - 1))
    assert str(plain(more)) == str(shown)
    assert int(shown.as_tuple().exponent) <= 0


@given(WIDE)
def test_text_has_neither_exponent_nor_float_noise_and_is_read_back(number: Decimal) -> None:
    written = text(number)
    assert set(written) <= set("-0123456789.")
    assert Fraction(written) == Fraction(number)
    assert not ("." in written and written.endswith(("0", ".")))


@pytest.mark.parametrize(
    ("number", "written"),
    [
        ("0.0150", "0.015"),
        ("1425.50", "1425.5"),
        ("1E+7", "10000000"),
        ("2.8E-7", "0.00000028"),
        ("-0", "0"),
        ("0E+5", "0"),
        ("100", "100"),
    ],
)
def test_text_is_what_a_person_would_write(number: str, written: str) -> None:
    assert text(Decimal(number)) == written
    assert str(plain(Decimal(number))).lower() in (written, number.lower())


# ---------------------------------------------------------------- counting


@given(WIDE, WIDE)
def test_products_are_exact(first: Decimal, second: Decimal) -> None:
    assert Fraction(product(first, second)) == Fraction(first) * Fraction(second)


@given(WIDE, WIDE)
def test_sums_are_exact(first: Decimal, second: Decimal) -> None:
    assert Fraction(total(first, second)) == Fraction(first) + Fraction(second)


@given(st.lists(PRICES, max_size=50))
def test_counting_up_and_down_again_ends_at_zero(amounts: list[Decimal]) -> None:
    counted = ZERO
    for amount in amounts:
        counted = total(counted, amount)
    for amount in reversed(amounts):
        counted = total(counted, amount.copy_negate())
    assert str(counted) == "0"


@given(WIDE, WIDE)
def test_a_notional_is_the_exact_product_rounded_half_up_at_8_decimals(quantity: Decimal, price: Decimal) -> None:
    exact = Fraction(quantity) * Fraction(price)
    steps = abs(exact) * 10**8 + Fraction(1, 2)
    rounded = Fraction(steps.numerator // steps.denominator, 10**8) * (1 if exact >= 0 else -1)
    assert Fraction(notional(quantity, price)) == rounded


@pytest.mark.parametrize(
    ("quantity", "price", "expected"),
    [
        ("0.015", "95033.33333333", "1425.5"),
        ("0.000000005", "1", "0.00000001"),
        ("0.0000000049", "1", "0"),
        ("0.000000015", "1", "0.00000002"),
        ("0.000000025", "1", "0.00000003"),
        ("-0.000000005", "1", "-0.00000001"),
        ("0", "95033.33", "0"),
        ("3", "0.1", "0.3"),
    ],
)
def test_halves_are_rounded_away_from_zero(quantity: str, price: str, expected: str) -> None:
    assert text(notional(Decimal(quantity), Decimal(price))) == expected


def test_nothing_is_lost_to_the_callers_precision() -> None:
    quantity, price = Decimal(12345678901234567890), Decimal("1.12345678")
    with localcontext(Context(prec=5)):
        found = product(quantity, price), total(quantity, price), notional(quantity, price)
    exact = Fraction(quantity) * Fraction(price), Fraction(quantity) + Fraction(price)
    assert tuple(map(Fraction, found)) == (exact[0], exact[1], exact[0])
