"""The error that ends a run with one clear line instead of a traceback."""


class RunError(Exception):
    """A run cannot start or go on; the message names the value, the place and the remedy."""


class RankError(RunError):
    """Seen by this rank alone, which must say it itself; the other ranks only notice that it is gone."""
