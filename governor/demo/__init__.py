"""`governor demo`: the whole thing on one machine, nothing of it real but the Governor."""

from governor.demo.run import main

__all__ = ["main"]
