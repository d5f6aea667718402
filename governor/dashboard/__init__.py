"""The web dashboard: a process of its own that follows the events and shows them.

It reads what everybody may read and folds it with the same projections; nothing waits for it. It writes to Redis only
where a person disarms or re-arms, which is off by default, and then as the commands do.
"""
