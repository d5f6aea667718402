"""What is told of a condition, that is of what is lost and comes back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from governor.alerts.messages import Alert
from governor.telling import clean, span


class Condition(NamedTuple):
    """Something that is lost and comes back: the words for both, with `{why}` and, how long it was away, `{span}`."""

    lost: str
    """Kind."""
    lost_words: tuple[str, str, str, str]
    """Headline, what happened, what was done, what to do."""
    back: str
    back_words: tuple[str, str, str, str]
    lost_waits: bool = True
    """Whether it is told only once it has lasted."""
    back_waits: bool = True
    """The same for its end."""


_GRANTED = "permits are granted again, if the state allows it."
CONDITIONS: Mapping[str, Condition] = {
    "redis": Condition(
        "redis_lost",
        (
            "REDIS LOST: {why}",
            "Redis cannot be read or written: {why}",
            "no permit is granted, exits neither; the emergency brake cannot be seen. It connects again by itself.",
            "`systemctl status redis-server`, then `governor doctor`. `governor disarm` works without Redis.",
        ),
        "redis_back",
        ("REDIS BACK after {span}", "Redis can be read and written again.", _GRANTED, "`governor doctor`."),
    ),
    "quarantine": Condition(
        "quarantined",
        (
            "QUARANTINED: two histories",
            "Stream and journal contradict each other: {why}",
            "no permit is granted and nothing is written to the stream, until a person decides.",
            'find out which history is true. `governor rearm --accept-history --reason "…"` takes the one in Redis.',
        ),
        "quarantine_ended",
        ("QUARANTINE ENDED after {span}", "Stream and journal agree again.", _GRANTED, "`governor status`."),
        lost_waits=False,  # only a person ends it
        back_waits=False,
    ),
    "journal": Condition(
        "journal_lost",
        (
            "JOURNAL LOST: {why}",
            "The journal cannot be written: {why}",
            "no permit is granted; it ends by itself once the disk takes it.",
            "`df -h` and `df -i` on GOV_JOURNAL_DIR, its owner and mode, then `governor doctor`.",
        ),
        "journal_back",
        ("JOURNAL BACK after {span}", "The journal can be written again.", _GRANTED, "`governor doctor`."),
    ),
    "exchange": Condition(
        "exchange_lost",
        (
            "EXCHANGE LOST: {why}",
            "The exchange gives no usable answer: {why}.",
            "plans that need its data are blocked (position_fetch_failed), exits too. It is asked again by itself.",
            "its status page, this host's network, `governor doctor`. Close by hand there what cannot wait.",
        ),
        "exchange_back",
        ("EXCHANGE BACK after {span}", "The exchange answers again.", _GRANTED, "`governor status`."),
        lost_waits=False,  # its calls say by themselves for how long they have failed
    ),
}


def of_condition(name: str, *, lost: bool, why: str, lasted_us: int, at_us: int) -> Alert:
    """What to tell of a condition: that it is lost and why, or that it is back and how long it was away."""
    condition = CONDITIONS[name]
    words = condition.lost_words if lost else condition.back_words
    headline, happened, done, todo = (
        word.format(why=clean(why, 240).rstrip("."), span=span(lasted_us / 1e6)) for word in words
    )
    return Alert(
        kind=condition.lost if lost else condition.back,
        headline=headline,
        happened=happened,
        done=done,
        todo=todo,
        at_us=at_us,
    )
