"""The limits and the states once more, naively: plain lists, every window and total counted from scratch each time.

Written from the contract; it shares no code with governor/ or projections/, so that each can be held against the
other. Times are microseconds, quantities base units, money USD. Nothing is ever forgotten here.
"""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from governor.policy import Limits, Policy  # the limits in force, read as plain values

FIVE_MINUTES, HOUR, DAY, MEMORY = 300_000_000, 3_600_000_000, 86_400_000_000, 90_000_000_000
SHARES = {"FULL_CLOSE_PROPOSED": "1", "PARTIAL_75": "0.75", "PARTIAL_50": "0.5", "PARTIAL_25": "0.25"}
NONE = Decimal(0)


class Asked(NamedTuple):
    """A plan, and all that is true when it comes."""

    plan_id: str
    entry: str
    written: int
    symbol: str = "BTCUSDT"
    action: str = "PARTIAL_75"
    decision: str = "EXECUTE"
    kill_score: Decimal = NONE
    close_qty: Decimal = NONE
    side: str | None = None
    legs: dict[str, Decimal] | None = None
    price: Decimal | None = None
    apply_mode: str | None = None
    halt: bool = False
    history: str = "whole"


class Answer(NamedTuple):
    verdict: str
    reason: str | None
    quantity: Decimal | None = None
    notional: Decimal | None = None
    asked: bool = False


@dataclass
class Fate:
    """What became of a plan_id; `counted` is when its place in windows and totals was taken, None without one."""

    symbol: str
    stop: bool
    at: int
    decided: bool
    permit: str = "none"
    quantity: Decimal = NONE
    notional: Decimal = NONE
    counted: int | None = None


class Model:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.first, self.latest, self.last_cause = -1, 0, 0
        self.entries: list[str] = []
        self.fates: dict[str, Fate] = {}
        self.granted: list[Fate] = []
        self.errors: list[int] = []
        self.disarms: list[str] = []
        self.causes: list[tuple[str | None, str]] = []
        self.disarmed, self.proven, self.epoch, self.cleared = False, True, 1, 0

    def view(self, now: int) -> tuple[str, int, list[tuple[str | None, str]]]:
        """State, epoch, and the causes of the throttle."""
        causes = [] if self.over(now) else self.causes
        return "DISARMED" if self.disarmed else "THROTTLED" if causes else "ARMED", self.epoch, causes

    def plan(self, now: int, plan: Asked) -> Answer | None:
        """None for an entry that was there before."""
        if self.again(plan.entry):
            return None
        self.tick(now)
        time, known = self.record(now), self.known(plan.plan_id, now)
        fate = Fate(plan.symbol, plan.action == "UPDATE_SL", time, plan.decision == "EXECUTE")
        if known is None or (fate.decided and not known.decided):
            self.fates[plan.plan_id] = fate
        if not fate.decided or (known and known.decided):
            return Answer("SKIP", "duplicate_plan" if fate.decided else "not_execute")
        limits = self.policy.by_symbol.get(plan.symbol, self.policy.limits)
        reason = self.fails_early(now, plan, limits)
        asked = reason is None and not fate.stop and self.policy.credentials
        price = plan.price if asked else None
        quantity = self.quantity(plan, asked=asked)
        notional = None if quantity is None else NONE
        if quantity is not None and price is not None:
            notional = (quantity * price).quantize(Decimal("1e-8"), ROUND_HALF_UP)
        reason = reason or self.fails_late(plan, limits, quantity, notional if price is not None else None)
        if reason is None:
            fate.permit, fate.quantity, fate.notional, fate.counted = (
                "outstanding",
                quantity or NONE,
                notional or NONE,
                time,
            )
            self.granted.append(fate)
        elif not fate.stop:
            self.follow(plan, reason)
        return Answer("BLOCK" if reason else "EXECUTE", reason, quantity, notional, asked)

    def fails_early(self, now: int, plan: Asked, limits: Limits) -> str | None:
        closes, limit = plan.action in SHARES, self.policy.kill_score_critical
        return first(
            (plan.history != "whole", plan.history),
            (self.disarmed, "disarmed"),
            (plan.halt, "halted"),
            (passes(now - plan.written, self.policy.max_plan_age_us), "plan_stale"),
            (not closes and plan.action != "UPDATE_SL", "unknown_action"),
            (not closes and limit is not None and plan.kill_score >= limit, "kill_score_critical_non_close"),
            (passes(self.used(plan, HOUR) + 1, limits.per_hour), "hourly_limit_exceeded"),
            (passes(self.used(plan, FIVE_MINUTES) + 1, limits.per_5min), "burst_limit_exceeded"),
        )

    def fails_late(self, plan: Asked, limits: Limits, quantity: Decimal | None, notional: Decimal | None) -> str | None:
        moves, asks = plan.action != "UPDATE_SL", self.policy.credentials
        today = [f for f in self.granted if f.counted is not None and f.counted // DAY == self.latest // DAY]
        mine = [f for f in today if f.symbol == plan.symbol]
        if notional is not None:
            daily = spent([f.notional for f in mine], notional, limits.notional_per_day)
            total = spent([f.notional for f in today], notional, self.policy.total_notional_per_day)
        else:
            daily, total = spent([f.quantity for f in mine], quantity or NONE, limits.qty_per_day), False
        throttled = plan.action != "FULL_CLOSE_PROPOSED" and any(s in (None, plan.symbol) for s, _ in self.causes)
        return first(
            (moves and asks and plan.legs is None, "position_fetch_failed"),
            (moves and asks and quantity == 0, "no_position"),
            (quantity is None, "quantity_unknown"),
            (moves and daily, "daily_limit_exceeded"),
            (moves and total, "total_daily_limit_exceeded"),
            (throttled and passes(self.used(plan, FIVE_MINUTES) + 1, self.policy.throttle_per_5min), "throttled"),
        )

    def quantity(self, plan: Asked, *, asked: bool) -> Decimal | None:
        if plan.action not in SHARES or (self.policy.credentials and (not asked or plan.legs is None)):
            return NONE if plan.action == "UPDATE_SL" else None
        if not self.policy.credentials:
            return plan.close_qty if plan.close_qty > 0 else self.policy.fallback_qty
        held = [abs(held) for leg, held in (plan.legs or {}).items() if plan.side in (None, "BOTH", *sides(leg, held))]
        return sum(held, NONE) * Decimal(SHARES[plan.action])

    def used(self, plan: Asked, window: int) -> int:
        same = [f for f in self.granted if (f.symbol, f.stop) == (plan.symbol, plan.action == "UPDATE_SL")]
        return sum(f.counted is not None and self.latest - f.counted < window for f in same)

    def follow(self, plan: Asked, reason: str) -> None:
        breach = reason == "burst_limit_exceeded" and self.policy.disarm_on_burst and plan.apply_mode != "dry_run"
        if breach and self.policy.auto_disarm:
            self.disarm("burst_limit_breach")
        elif reason in ("burst_limit_exceeded", "hourly_limit_exceeded", "daily_limit_exceeded"):
            self.throttle(plan.symbol, reason)
        elif reason == "total_daily_limit_exceeded":
            self.throttle(None, reason)

    def malformed(self, now: int, entry: str, decision: str) -> None:
        if not self.again(entry):
            self.record(now)
            self.wrong(int(decision in ("EXECUTE", "")))

    def result(
        self, now: int, plan_id: str, entry: str, written: int, *, executed: bool, failed: bool, quantity: Decimal
    ) -> None:
        if not (executed or failed) or self.again("result " + entry):
            return
        young = -1 < self.first < written and max(now, self.latest) - written < MEMORY
        time, fate = self.record(now), self.known(plan_id, now)
        permit = fate.permit if fate else "unknown" if young else "too old to know"
        errors = 0
        if fate and permit != "none":
            errors = (executed and permit == "expired") + (quantity > fate.quantity) + failed
        if fate and executed and permit in ("outstanding", "expired"):
            fate.counted, fate.permit = time if permit == "expired" else fate.counted, "consumed"
        if executed and permit in ("revoked", "none", "unknown"):
            if self.policy.auto_disarm and self.policy.disarm_on_unpermitted:
                self.disarm("unpermitted_execution")
            else:
                self.throttle(None, "unpermitted_execution")
        self.wrong(errors)

    def take_back(self, now: int, plan_id: str, *, gone: bool) -> None:
        fate = self.fates.get(plan_id)
        if fate and fate.permit == "outstanding":
            self.record(now)
            fate.permit, fate.counted = ("consumed", fate.counted) if gone else ("expired", None)

    def consumed_before_the_disarm(self, now: int, plan_id: str) -> None:
        fate = self.known(plan_id, 0)
        if fate and fate.permit == "revoked":
            self.record(now)
            fate.permit = "consumed"

    def tick(self, now: int) -> None:
        if self.causes and self.over(now):
            self.record(now)
            self.causes = []

    def disarm_by_hand(self, now: int, why: str, apply_mode: str | None) -> None:
        if not self.disarmed or (self.proven and apply_mode != "dry_run"):
            self.record(now)
            self.disarmed = False
            self.disarm(why)

    def prove(self, now: int) -> None:
        """The Apply Layer was seen in dry run."""
        self.record(now)
        self.proven = True

    def rearm(self, now: int, *, force: bool, halt: bool) -> bool:
        """False where it is refused."""
        if self.disarmed and (force or (self.proven and not halt)):
            self.record(now)
            self.disarmed, self.epoch, self.cleared = False, self.epoch + 1, len(self.errors)
            return True
        return not self.disarmed

    def wrong(self, more: int) -> None:
        """So many errors at once, and what follows from their number."""
        limit, self.errors = self.policy.disarm_on_errors, [*self.errors, *[self.latest] * more]
        recent = sum(self.latest - error < self.policy.error_window_us for error in self.errors[self.cleared :])
        if more and limit is not None and recent >= limit and self.policy.auto_disarm:
            self.disarm("repeated_errors")
        elif more and limit is not None and 2 * recent >= limit:
            self.throttle(None, "repeated_errors")

    def throttle(self, symbol: str | None, reason: str) -> None:
        causes = [] if self.over(self.latest) else self.causes
        if not self.disarmed and (symbol, reason) not in causes:
            self.causes, self.last_cause = [*causes, (symbol, reason)], self.latest

    def disarm(self, why: str) -> None:
        if not self.disarmed:
            self.disarmed, self.proven, self.causes, self.epoch = True, False, [], self.epoch + 1
            self.disarms.append(why)
            for fate in self.fates.values():
                fate.permit = "revoked" if fate.permit == "outstanding" else fate.permit

    def again(self, entry: str) -> bool:
        self.entries.append(entry)
        return entry in self.entries[:-1]

    def record(self, now: int) -> int:
        """Something is recorded: the time it counts at, which never steps back."""
        self.latest = max(self.latest, now)
        self.first = self.latest if self.first < 0 else self.first
        return self.latest

    def over(self, now: int) -> bool:
        return max(now, self.latest) >= self.last_cause + self.policy.throttle_cooldown_us

    def known(self, plan_id: str, now: int) -> Fate | None:
        fate = self.fates.get(plan_id)
        fresh = fate and (fate.permit == "outstanding" or max(now, self.latest) - fate.at < MEMORY)
        return fate if fresh else None


def first(*gates: tuple[bool, str]) -> str | None:
    return next((reason for fails, reason in gates if fails), None)


def passes(number: int, limit: int | None) -> bool:
    return limit is not None and number > limit


def spent(used: list[Decimal], more: Decimal, limit: Decimal | None) -> bool:
    """A total may reach its limit, not pass it; zero means that none is allowed."""
    return limit is not None and (limit == 0 or sum(used, more) > limit)


def sides(leg: str, held: Decimal) -> tuple[str, ...]:
    """In one-way mode the one row lies on one side."""
    return (leg,) if leg != "BOTH" else ("LONG",) if held > 0 else ("SHORT",)
