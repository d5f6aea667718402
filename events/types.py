"""The closed union of everything that can happen, as frozen values.

Names and fields are wire format (see docs/events.md): a field may be added with a default, never changed or
removed; anything else is a new schema version and a step in `events.codec.UPCASTERS`.
Times inside events are integer microseconds since the epoch and end in `_us`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec

Context: TypeAlias = dict[str, str | int]
"""What a disarm was about, as the reason's own small record."""


class _Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    NAME: ClassVar[str]
    VERSION: ClassVar[int] = 1
    v: int = 1


class PlanReceived(_Event, frozen=True, kw_only=True):
    """A plan was read from the plan stream; its decision follows in the same commit."""

    NAME: ClassVar[str] = "PLAN_RECEIVED"
    plan_id: str
    symbol: str
    action: str
    decision: str
    entry_id: str
    """The stream entry; its first half is the plan's time in milliseconds."""
    fields: dict[str, str]
    """Every field as the producer wrote it, unknown ones too."""
    truncated: bool = False
    """True when unused fields were cut because the entry was larger than an event may be."""


class PlanRejected(_Event, frozen=True, kw_only=True):
    """A plan that cannot be read."""

    NAME: ClassVar[str] = "PLAN_REJECTED"
    entry_id: str
    reason: str
    """What is wrong: the field, its value and what was expected."""
    plan_id: str | None = None
    symbol: str | None = None
    decision: str | None = None
    fields: dict[str, str] = {}
    truncated: bool = False
    """True when fields were cut; what is wrong can then only be taken from `reason`."""


class PlanLost(_Event, frozen=True, kw_only=True):
    """Plans were trimmed from the stream before they were decided."""

    NAME: ClassVar[str] = "PLAN_LOST"
    count: int
    entry_ids: tuple[str, ...] = ()
    """The entries, where their ids are known; for entries trimmed unread, `<last entry before>+<how many>`."""


class Check(msgspec.Struct, frozen=True, gc=False):
    """One gate's answer."""

    gate: str
    ok: bool | None
    """None: could not be evaluated, or does not concern this plan."""
    used: Decimal | None = None
    limit: Decimal | None = None


class Decision(_Event, frozen=True, kw_only=True):
    """The verdict over one plan, with every input and every check."""

    NAME: ClassVar[str] = "DECISION"
    plan_id: str
    symbol: str
    action: str
    verdict: str
    """`EXECUTE`, `BLOCK` or `SKIP`."""
    reason: str | None
    """The first gate that failed; None for EXECUTE."""
    computed_qty: Decimal | None
    """Quantity the plan would move, base units; None where it could not be known."""
    computed_notional: Decimal | None
    """Quantity times mark price, USD; 0 without a price."""
    position_amt: Decimal | None = None
    """Size of the position the plan touches, base units, never negative."""
    mark_price: Decimal | None = None
    apply_mode: str | None = None
    """`APPLY_MODE` in the Apply Layer's file at that moment, if it could be read."""
    checks: tuple[Check, ...] = ()
    entry_id: str
    mode: str
    """State before this decision."""
    epoch: int
    settings: str
    """Digest of the SETTINGS_LOADED in force."""
    history: str = "whole"
    """Input of the first gate: `whole`, `quarantined` or `history_hold`."""
    halt: bool = False
    """Whether the emergency brake was set."""
    asked: bool = False
    """Whether the exchange was asked."""
    legs: dict[str, Decimal] | None = None
    """Signed position amounts by side, as the exchange told them."""
    position_error: str | None = None
    price_error: str | None = None
    expires_us: int | None = None
    """When the permit ends; None without one."""
    error: str | None = None
    """What went wrong inside, for `evaluation_error`."""


class PermitConsumed(_Event, frozen=True, kw_only=True):
    """A permit was used, or has to be taken for used: its reservation stays."""

    NAME: ClassVar[str] = "PERMIT_CONSUMED"
    plan_id: str
    symbol: str
    source: str
    """`observed` (gone before its time), `result` (an execution told so) or `assumed` (nobody was watching)."""


class PermitExpired(_Event, frozen=True, kw_only=True):
    """A permit was taken back unused: its reservation is released."""

    NAME: ClassVar[str] = "PERMIT_EXPIRED"
    plan_id: str
    symbol: str


class PermitRevoked(_Event, frozen=True, kw_only=True):
    """A disarm deleted the permit: its reservation stays counted."""

    NAME: ClassVar[str] = "PERMIT_REVOKED"
    plan_id: str
    symbol: str


class Execution(_Event, frozen=True, kw_only=True):
    """The Apply Layer told a result that matters, matched to its permit."""

    NAME: ClassVar[str] = "EXECUTION"
    plan_id: str
    symbol: str
    decision: str
    executed: bool
    entry_id: str
    permit: str
    """`consumed`, `outstanding`, `expired`, `revoked`, `none` (known, never permitted) or `unknown`."""
    executed_qty: Decimal | None = None
    counted: bool = False
    """True when a released reservation is counted again."""
    failed: bool = False
    """A step failed, or the whole plan did."""
    error: str | None = None
    fields: dict[str, str] = {}
    truncated: bool = False
    """True when fields were cut; what they said can then only be taken from this event."""


class UnpermittedExecution(_Event, frozen=True, kw_only=True):
    """Something trades around the gate."""

    NAME: ClassVar[str] = "UNPERMITTED_EXECUTION"
    plan_id: str
    symbol: str
    entry_id: str
    permit: str
    """`revoked`, `none` or `unknown`, as in EXECUTION."""


class ErrorRecorded(_Event, frozen=True, kw_only=True):
    """One error that counts towards the automatic disarm."""

    NAME: ClassVar[str] = "ERROR_RECORDED"
    kind: str
    detail: str
    plan_id: str | None = None
    symbol: str | None = None


class Throttled(_Event, frozen=True, kw_only=True):
    """A new cause for fewer permits."""

    NAME: ClassVar[str] = "THROTTLED"
    symbol: str | None
    """Where the cause lies; None for all symbols."""
    reason: str
    until_us: int
    """When it ends if nothing new happens."""


class Recovered(_Event, frozen=True, kw_only=True):
    """The cool-down after the last new cause is over."""

    NAME: ClassVar[str] = "RECOVERED"


class DisarmStarted(_Event, frozen=True, kw_only=True):
    """Disarmed: no permits from here on. The effect on the Apply Layer still has to be proven."""

    NAME: ClassVar[str] = "DISARM_STARTED"
    reason: str
    context: Context
    epoch: int
    """The epoch this disarm begins."""
    manual: bool = False
    operator: str | None = None


class AutoDisarm(_Event, frozen=True, kw_only=True):
    """An automatic disarm is done and was verified."""

    NAME: ClassVar[str] = "AUTO_DISARM"
    reason: str
    context: Context
    action_taken: str
    epoch: int
    proof: dict[str, Any] = {}
    """What was read back after the restart."""


class ManualDisarm(_Event, frozen=True, kw_only=True):
    """A disarm by hand is done and was verified."""

    NAME: ClassVar[str] = "MANUAL_DISARM"
    reason: str
    context: Context
    action_taken: str
    epoch: int
    operator: str
    proof: dict[str, Any] = {}


class DisarmFailed(_Event, frozen=True, kw_only=True):
    """Forcing the Apply Layer to dry run did not work; it is tried again."""

    NAME: ClassVar[str] = "DISARM_FAILED"
    epoch: int
    attempt: int
    step: str
    error: str


class Rearmed(_Event, frozen=True, kw_only=True):
    """A person armed it again."""

    NAME: ClassVar[str] = "REARMED"
    reason: str
    operator: str
    epoch: int
    """The epoch this begins."""
    forced: bool = False


class ApplyModeDrifted(_Event, frozen=True, kw_only=True):
    """While DISARMED, after the proof: somebody set the Apply Layer's file to another mode than dry run."""

    NAME: ClassVar[str] = "APPLY_MODE_DRIFTED"
    epoch: int
    apply_mode: str
    """What the file says now; at most 64 characters of it."""


class DriftEnded(_Event, frozen=True, kw_only=True):
    """While DISARMED: the Apply Layer's file says dry run again."""

    NAME: ClassVar[str] = "DRIFT_ENDED"
    epoch: int


class ApplyModeRestored(_Event, frozen=True, kw_only=True):
    """A person who armed it had `APPLY_MODE` set back and the service restarted; both were verified."""

    NAME: ClassVar[str] = "APPLY_MODE_RESTORED"
    epoch: int
    """The epoch in which it was done."""
    reason: str
    operator: str
    apply_mode: str
    proof: dict[str, Any] = {}
    """What was read back after the restart."""


class SettingsLoaded(_Event, frozen=True, kw_only=True):
    """The settings decisions are made under from here on."""

    NAME: ClassVar[str] = "SETTINGS_LOADED"
    digest: str
    settings: dict[str, str]
    """Every setting that takes part in a decision, by its variable's name."""
    limits: dict[str, dict[str, str]] = {}
    """Limits of single symbols, by symbol, then by variable's name."""
    version: str = ""
    host: str = ""


class HistoryRestored(_Event, frozen=True, kw_only=True):
    """Events that Redis had lost were written back from the journal."""

    NAME: ClassVar[str] = "HISTORY_RESTORED"
    events: int
    hold_until_us: int


class HistoryAccepted(_Event, frozen=True, kw_only=True):
    """A person took Redis' history where it contradicts the journal."""

    NAME: ClassVar[str] = "HISTORY_ACCEPTED"
    reason: str
    operator: str
    hold_until_us: int


Event: TypeAlias = (
    PlanReceived
    | PlanRejected
    | PlanLost
    | Decision
    | PermitConsumed
    | PermitExpired
    | PermitRevoked
    | Execution
    | UnpermittedExecution
    | ErrorRecorded
    | Throttled
    | Recovered
    | DisarmStarted
    | AutoDisarm
    | ManualDisarm
    | DisarmFailed
    | Rearmed
    | SettingsLoaded
    | HistoryRestored
    | HistoryAccepted
    | ApplyModeDrifted
    | DriftEnded
    | ApplyModeRestored
)

ALL: tuple[type[Event], ...] = Event.__args__
BY_NAME: dict[str, type[Event]] = {cls.NAME: cls for cls in ALL}


class Head(NamedTuple):
    """Where a stream ends: the last event's number and hash."""

    seq: int
    hash: str


class Entry(msgspec.Struct, frozen=True, gc=False):
    """An event as stored: exactly the bytes the chain covers."""

    name: str
    seq: int
    timestamp: str
    """Unix seconds with six decimals."""
    data: bytes
    """A JSON object."""
    hash: str

    @property
    def head(self) -> Head:
        """Head of a history that ends with it."""
        return Head(self.seq, self.hash)


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """An event as read: decoded, with its place in the stream."""

    seq: int
    at: int
    """Microseconds since the epoch."""
    event: Event
    hash: str
