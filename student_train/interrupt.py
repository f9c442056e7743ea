"""A polite end of training: see shared.interrupt."""

from shared.interrupt import StopRequest

__all__ = ["StopRequest"]
