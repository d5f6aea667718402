"""A simulated Apply Layer, as a process of its own, for the demo and for tests.

It speaks exactly the outside format: publishes plans with every field the real one writes, consumes permits through
`governor.gate`, publishes results, and reads `APPLY_MODE` from its environment file once, at start, as a systemd
service does. What it proposes is told to it through a Redis list, one JSON object a proposal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import redis

from governor.envfile import effective
from governor.gate import PermitDenied, PermitGate

PLAN_STREAM, RESULT_STREAM = "quantum:stream:apply.plan", "quantum:stream:apply.result"
PROPOSALS = "demo:proposals"
MAXLEN = 10_000
WAIT_S = 1.2


def plan_fields(proposal: dict[str, Any], *, now: float) -> dict[str, str]:
    """A plan as flat strings, field for field as the Apply Layer writes it."""
    decision = proposal.get("decision", "EXECUTE")
    return {
        "plan_id": proposal["plan_id"],
        "symbol": proposal["symbol"],
        "action": proposal["action"],
        "kill_score": str(proposal.get("kill_score", 0.31)),
        "k_regime_flip": "0.0",
        "k_sigma_spike": "0.12",
        "k_ts_drop": "0.19",
        "k_age_penalty": "0.0",
        "new_sl_proposed": str(proposal.get("new_sl", "")),
        "R_net": "1.84",
        "decision": decision,
        "reason_codes": "" if decision == "EXECUTE" else "cooldown_active",
        "steps": json.dumps([{"step": "CLOSE", "type": "market_reduce_only", "pct": 100.0}]),
        "close_qty": "0.0",
        "price": "",
        "timestamp": str(int(now)),
    }


def result_fields(proposal: dict[str, Any], *, executed: bool, qty: str, error: str, now: float) -> dict[str, str]:
    """A result in the same way."""
    steps = [{"step": "CLOSE", "status": "filled", "executed_qty": qty}] if executed else []
    return {
        "plan_id": proposal["plan_id"],
        "symbol": proposal["symbol"],
        "decision": "EXECUTE" if executed else "BLOCKED",
        "executed": str(executed),
        "would_execute": "True",
        "steps_results": json.dumps(steps),
        "error": error,
        "timestamp": str(int(now)),
    }


class ApplyLayer:
    """Publishes, consumes, executes (or not, in dry run)."""

    def __init__(self, client: redis.Redis, mode: str) -> None:
        self._redis = client
        self._gate = PermitGate(client)
        self.mode = mode

    def handle(self, proposals: list[dict[str, Any]]) -> None:
        """Publish proposals together, then go through them one by one."""
        for proposal in proposals:
            self._redis.xadd(PLAN_STREAM, plan_fields(proposal, now=time.time()), maxlen=MAXLEN, approximate=True)  # type: ignore[arg-type]
        for proposal in proposals:
            if proposal.get("decision", "EXECUTE") == "EXECUTE" and not proposal.get("forgets"):
                self._execute(proposal)

    def _execute(self, proposal: dict[str, Any]) -> None:
        if self.mode == "dry_run":
            return
        try:
            permit = self._gate.consume(proposal["plan_id"], symbol=proposal["symbol"], wait_s=WAIT_S)
        except PermitDenied as denied:
            self._tell(proposal, executed=False, qty="0", error=denied.code)
            return
        self._tell(proposal, executed=True, qty=str(permit.computed_qty), error="")

    def _tell(self, proposal: dict[str, Any], *, executed: bool, qty: str, error: str) -> None:
        fields = result_fields(proposal, executed=executed, qty=qty, error=error, now=time.time())
        self._redis.xadd(RESULT_STREAM, fields, maxlen=MAXLEN, approximate=True)  # type: ignore[arg-type]


def main() -> None:
    """Serve until killed: `REDIS_PORT` and `APPLY_CONFIG_PATH` say where."""
    mode = effective(Path(os.environ["APPLY_CONFIG_PATH"]).read_bytes(), "APPLY_MODE") or "dry_run"
    client = redis.Redis(host="127.0.0.1", port=int(os.environ["REDIS_PORT"]), decode_responses=True)
    layer = ApplyLayer(client, mode)
    print(f"apply layer in mode {mode}", flush=True)  # noqa: T201 - its log
    while True:
        try:
            popped: Any = client.blpop([PROPOSALS], timeout=1)
        except redis.RedisError as error:
            sys.exit(f"apply layer: {error}")
        if popped is not None:
            layer.handle(json.loads(popped[1]))


if __name__ == "__main__":
    main()
