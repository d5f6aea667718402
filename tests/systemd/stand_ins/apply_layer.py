"""An Apply Layer as a service: it takes its mode from its environment, once, and does what it is told through a FIFO.

A line of the FIFO `$RUNTIME_DIRECTORY/proposals` is a JSON list of proposals, published together.
"""

import json
import os
from pathlib import Path

import redis

from governor.sim.apply_layer import ApplyLayer


def main() -> None:
    """Serve until killed."""
    client = redis.Redis(
        host=os.environ.get("REDIS_HOST", "127.0.0.1"),
        port=int(os.environ.get("REDIS_PORT", "6379")),
        username=os.environ.get("REDIS_USERNAME") or None,
        password=os.environ.get("REDIS_PASSWORD") or None,
        decode_responses=True,
    )
    layer = ApplyLayer(client, os.environ.get("APPLY_MODE", "dry_run"))
    fifo = Path(os.environ["RUNTIME_DIRECTORY"], "proposals")
    os.mkfifo(fifo, 0o600)
    print(f"apply layer in mode {layer.mode}", flush=True)  # noqa: T201 - its log
    both_ends = os.open(fifo, os.O_RDWR)  # so that a writer that goes away is not the end
    with os.fdopen(both_ends) as lines:
        for line in lines:
            layer.handle(json.loads(line))


if __name__ == "__main__":
    main()
