"""Decimals for money and quantity: read strictly, computed exactly, written plainly."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from re import compile as regex

MAX_DIGITS = 38
MAX_EXPONENT = 30
MATH = Context(prec=2 * MAX_DIGITS + 2 * MAX_EXPONENT)
"""Wide enough that the product of any two numbers `parse` lets in is exact."""

ZERO = Decimal(0)
_ONE = Decimal(1)
_NUMBER = regex(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?").fullmatch
_CENTS = Decimal("0.00000001")


def parse(text: str) -> Decimal:
    """Read a number as a client or an exchange writes it, scientific notation included.

    Raises:
        ValueError: not a number, not finite, or too long or too far from one to be a price or a quantity.
    """
    if len(text) > 2 * MAX_DIGITS or not text.isascii() or not _NUMBER(text):
        raise ValueError(f"{text[:40]!r} is no finite decimal number")
    number = Decimal(text)
    if (len(text) > MAX_DIGITS and len(number.as_tuple().digits) > MAX_DIGITS) or (
        number and abs(number.adjusted()) > MAX_EXPONENT
    ):
        raise ValueError(f"{text[:40]!r} has more digits than any price or quantity")
    return plain(number)


def plain(number: Decimal) -> Decimal:
    """The same number without trailing zeros and without an exponent above zero, so that equals look equal."""
    if not number:
        return ZERO
    number = number.normalize(MATH)
    # Only an exponent above zero is written with a plus, and taking the number apart to look takes five times as long.
    return number.quantize(_ONE, context=MATH) if number.adjusted() > 0 and "+" in str(number) else number


def text(number: Decimal) -> str:
    """Digits for a reader or a Redis key: never an exponent."""
    return format(plain(number), "f")


def product(quantity: Decimal, factor: Decimal) -> Decimal:
    """Exact product."""
    return plain(MATH.multiply(quantity, factor))


def total(first: Decimal, second: Decimal) -> Decimal:
    """Exact sum."""
    return plain(MATH.add(first, second))


def notional(quantity: Decimal, price: Decimal) -> Decimal:
    """Quantity times price in quote units, rounded half up to 8 decimals."""
    exact = MATH.multiply(quantity, price)
    try:
        return plain(exact.quantize(_CENTS, rounding=ROUND_HALF_UP, context=MATH))
    except InvalidOperation:  # pragma: no cover - parse keeps numbers far below this
        raise ValueError(f"{quantity} x {price} is too large") from None
