"""Alerts the daemon sends itself: what happened becomes messages (pure), and messages reach people (threads).

    events, conditions ─► rules ─► one bounded queue a target ─► a thread each ─► apprise
                          (pure)   (never waited for)            (retried, with a limit of age)

It tells what was committed, and after what has to be done was begun. No permit waits for any of this.
"""
