"""A history as a governor writes it, of any length: decided by the decider, folded, encoded and chained. By seed."""

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from heapq import heappop, heappush
from random import Random

from events.codec import encode
from events.types import AutoDisarm, DisarmStarted, Entry, Event, ManualDisarm, Recorded, SettingsLoaded
from governor import decider
from governor.gates import Situation
from governor.market import Market
from governor.permits import TAKE_BACK_US
from governor.plans import MalformedPlanError, parse_plan
from governor.policy import DEFAULTS, digest, from_texts
from governor.results import parse_result
from governor.sim.apply_layer import plan_fields, result_fields
from projections.state import DISARMED, State, evolve, initial

SECOND = 1_000_000
START = 1_769_212_800 * SECOND
"""2026-01-24 00:00:00 UTC."""
GAP_US = 6.5 * SECOND
"""Between two plans, on average: a million events are three weeks."""
SYMBOLS = tuple(f"C{number:03}USDT" for number in range(200))
ACTIONS = ("PARTIAL_25", "PARTIAL_50", "PARTIAL_75", "FULL_CLOSE_PROPOSED", "UPDATE_SL", "OPEN_LONG")
ACTION_WEIGHTS = (40, 25, 10, 12, 12, 1)
TEXTS = DEFAULTS | {
    "GOV_MAX_EXEC_PER_HOUR": "12",
    "GOV_MAX_EXEC_PER_5MIN": "5",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "60000",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "100",
    "GOV_DISARM_ON_ERROR_COUNT": "10",
    "credentials": "true",
}
LIMITS = {symbol: {"GOV_MAX_EXEC_PER_HOUR": "3"} for symbol in SYMBOLS[:20]}


class History:
    """One account's life, a step after the other."""

    def __init__(
        self,
        seed: int = 1,
        *,
        start_us: int = START,
        gap_us: float = GAP_US,
        symbols: Sequence[str] = SYMBOLS,
        slowest_ms: int = 900,
    ) -> None:
        self.state: State = initial()
        self.now = start_us
        self.entries: list[Entry] = []
        """What was written since they were last taken."""
        self._random = Random(seed)  # noqa: S311 - a history, made again by its seed
        self._policy, self._digest = from_texts(TEXTS, LIMITS), digest(TEXTS, LIMITS)
        self._due: list[tuple[int, int, str, str]] = []
        self._made = self._told = 0
        self._last = ("", "")
        self._prices = {symbol: Decimal(self._random.randrange(50, 90_000_00)) / 100 for symbol in symbols}
        self.gap_us, self._symbols, self._slowest_ms = gap_us, symbols, slowest_ms
        self._mode = "testnet"
        self._write([SettingsLoaded(digest=self._digest, settings=TEXTS, limits=LIMITS, version="0", host="bench")])

    def plan(self) -> None:
        """The next plan, after everything that is due before it."""
        until = self.now + int(self._random.expovariate(1 / self.gap_us))
        while self._due and self._due[0][0] <= until:
            at, _, what, plan_id = heappop(self._due)
            self.now = max(self.now, at)
            getattr(self, f"_{what}")(plan_id)
        self.now = until
        self._write(decider.tick(self.state, self.now))
        self._decide()

    def _decide(self) -> None:
        random = self._random
        self._made += 1
        if self._made == 1 or random.random() > 0.01:
            symbol = self._symbols[int(random.triangular(0, len(self._symbols), len(self._symbols) / 10))]
            self._last = f"{symbol}-{self.now // SECOND}-{self._made:06}", symbol
        plan_id, symbol = self._last
        proposal = {
            "plan_id": plan_id,
            "symbol": symbol,
            "action": random.choices(ACTIONS, ACTION_WEIGHTS)[0],
            "kill_score": "nan" if random.random() < 0.0005 else f"{random.betavariate(2, 5):.4f}",
            "decision": "EXECUTE" if random.random() < 0.9 else "SKIP",
        }
        fields = plan_fields(proposal, now=self.now / SECOND)
        age = 90_000 if random.random() < 0.01 else random.randrange(5, self._slowest_ms)
        entry_id = f"{self.now // 1000 - age}-{self._made % 3}"
        halt = random.random() < 0.0005
        situation = Situation(now=self.now, apply_mode=self._mode, halt=halt)
        try:
            plan = parse_plan(fields, entry_id=entry_id, now=self.now, needs_close_qty=False)
        except MalformedPlanError as problem:
            self._write(decider.reject(self.state, problem, self._policy, situation, fields=fields, entry_id=entry_id))
            return
        asks = decider.must_ask(self.state, plan, self._policy, situation)
        decided = decider.decide(
            self.state, plan, self._market(symbol) if asks else None, self._policy, situation,
            fields=fields, settings=self._digest,
        )  # fmt: skip
        self._write(decided.events)
        if decided.decision is not None and decided.decision.verdict == "EXECUTE":
            self._granted(plan.plan_id)
        elif decided.decision is not None and decided.decision.verdict == "BLOCK":
            self._after(1_200_000, "denied", plan.plan_id)

    def _market(self, symbol: str) -> Market:
        random = self._random
        price = self._prices[symbol] = (
            self._prices[symbol] * Decimal(random.randrange(9990, 10011)) / 10_000
        ).quantize(Decimal("0.00000001"))
        size = (Decimal(random.randrange(200, 4000)) / price).quantize(Decimal("0.001"))
        failed = random.random()
        if failed < 0.01:
            return Market(mark_price=price, position_error="timeout")
        legs = {"BOTH": Decimal(0) if random.random() < 0.01 else size}
        if random.random() < 0.1:
            legs = {"LONG": size, "SHORT": -size / 2}
        return Market(legs=legs) if failed > 0.99 else Market(legs=legs, mark_price=price)

    def _granted(self, plan_id: str) -> None:
        random = self._random
        ttl = self._policy.permit_ttl_us
        if random.random() < 0.85:
            taken = random.randrange(50_000, 2 * SECOND)
            self._after(taken, "taken", plan_id)
            self._after(taken + random.randrange(50_000, 3 * SECOND), "result", plan_id)
        else:
            self._after(ttl - TAKE_BACK_US, "unused", plan_id)

    def _taken(self, plan_id: str) -> None:
        self._write(decider.take_back(self.state, plan_id, gone=True, now=self.now))

    def _unused(self, plan_id: str) -> None:
        self._write(decider.take_back(self.state, plan_id, gone=False, now=self.now))

    def _result(self, plan_id: str) -> None:
        plan = self.state.plan(plan_id)
        if plan is None or plan.reservation is None:
            return
        chance = self._random.random()
        quantity = plan.reservation.quantity * (2 if chance < 0.001 else 1)
        error = "order would trigger immediately" if chance > 0.999 else ""
        self._tell(plan_id, executed=True, qty=f"{quantity}", error=error)

    def _denied(self, plan_id: str) -> None:
        self._tell(plan_id, executed=False, qty="0", error="missing_permit_or_redis")

    def _tell(self, plan_id: str, *, executed: bool, qty: str, error: str) -> None:
        proposal = {"plan_id": plan_id, "symbol": plan_id.partition("-")[0]}
        fields = result_fields(proposal, executed=executed, qty=qty, error=error, now=self.now / SECOND)
        self._told += 1
        told = parse_result(fields, entry_id=f"{self.now // 1000}-{self._told % 5}")
        self._write(decider.execution(self.state, told, self._policy, self.now, fields=fields))

    def _disarmed(self, _: str) -> None:
        disarm = self.state.mode.disarm
        if disarm is None or disarm.done:
            return
        done = {"action_taken": decider.ACTION_TAKEN, "epoch": disarm.epoch, "proof": {"APPLY_MODE": decider.DRY_RUN}}
        if disarm.manual:
            self._write([ManualDisarm(reason=disarm.reason, context=disarm.context, operator="anna", **done)])  # type: ignore[arg-type]
        else:
            self._write([AutoDisarm(reason=disarm.reason, context=disarm.context, **done)])  # type: ignore[arg-type]
        self._after(600 * SECOND, "rearmed", "")

    def _rearmed(self, _: str) -> None:
        self._mode = "testnet"
        self._write(decider.rearm(self.state, reason="looked at it", operator="anna", force=False, halt=False))

    def _after(self, span: int, what: str, plan_id: str) -> None:
        heappush(self._due, (self.now + span, len(self._due) + self._made, what, plan_id))

    def _write(self, events: Iterable[Event]) -> None:
        for event in events:
            entry = encode(event, after=self.state.head, at=self.now)
            evolve(self.state, Recorded(entry.seq, self.now, event, entry.hash))
            self.entries.append(entry)
            if isinstance(event, DisarmStarted):
                self._mode = decider.DRY_RUN
                self._after(3 * SECOND, "disarmed", "")
        if events and self.state.mode.state != DISARMED and self._random.random() < 0.00002:
            self._write(decider.disarm_by_hand(self.state, reason="drill", operator="anna", apply_mode=self._mode))


def written(events: int, *, seed: int = 1, size: int = 2000) -> Iterator[list[Entry]]:
    """A history of at least so many entries, the last plan whole, about `size` at a time."""
    history = History(seed)
    left = events
    while left > 0:
        while len(history.entries) < min(size, left):
            history.plan()
        page, history.entries = history.entries, []
        left -= len(page)
        yield page
