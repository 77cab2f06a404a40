"""Errors of datasets and clips that a user can act on."""

from core.errors import UserError


class DataError(UserError):
    """Bad input or a bad dataset."""


class ReadError(DataError):
    """Reading failed again and again though nothing is known to be wrong with the data: another attempt may succeed."""

    retry = True


class MissingData(DataError):
    """A dataset, or a file of it, that is not there or cannot be opened: a wrong path, or a mount or a permission that
    is missing. Where it was there before, another attempt may find it again."""

    may_return = True


class DamagedSample(DataError):
    """One stored sample whose bytes are verifiably wrong (empty, checksum, parse, shape, NaN or inf): skippable.

    key: the sample's key; shard: name of the tar file that holds it; reason: what is wrong with it.
    """

    def __init__(self, key: str, shard: str, reason: str):
        super().__init__(f"damaged sample {key} in {shard}: {reason}")
        self.key, self.shard, self.reason = key, shard, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.key, self.shard, self.reason)  # three arguments, so it survives process boundaries
