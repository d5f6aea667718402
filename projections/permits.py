"""Plans that were seen and what became of their permits."""

from __future__ import annotations

from decimal import Decimal

import msgspec

MEMORY_US = 25 * 3_600_000_000
"""How long a plan is remembered: the 24 hours of the contract and an hour to spare."""
ENTRIES_KEPT = 20_000
"""How many stream entries are remembered against redelivery: twice what the producer's MAXLEN keeps."""


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """An outstanding permit and the place it holds in windows and totals."""

    symbol: str
    at: int
    """When it was counted, microseconds, event time."""
    expires_us: int
    quantity: Decimal
    notional: Decimal
    moves: bool
    """False for a permit that moves no quantity and counts in windows of its own (UPDATE_SL)."""
    epoch: int


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What is remembered of a plan."""

    at: int
    """When it was decided, microseconds, event time."""
    symbol: str
    entry_id: str
    verdict: str
    """`EXECUTE` or `BLOCK` when it was decided as EXECUTE, `SKIP` when it never was."""
    permit: str = "none"
    """`none`, `outstanding`, `consumed`, `expired` or `revoked`."""
    reservation: Reservation | None = None
    """What it was granted, kept for the results that follow."""

    @property
    def decided(self) -> bool:
        """Whether its plan_id is used up."""
        return self.verdict != "SKIP"
