"""Errors of the data room that a user can act on."""


class DataError(Exception):
    """Bad input or a bad dataset. The message names value, place and remedy; programs print it and exit with 1."""


class ReadError(DataError):
    """Reading failed again and again though nothing is known to be wrong with the data: another attempt may succeed."""


class DamagedSample(DataError):
    """One stored sample whose bytes are verifiably wrong (empty, checksum, parse, shape, NaN or inf): skippable.

    key: the sample's key; shard: name of the tar file that holds it; reason: what is wrong with it.
    """

    def __init__(self, key: str, shard: str, reason: str):
        super().__init__(f"damaged sample {key} in {shard}: {reason}")
        self.key, self.shard, self.reason = key, shard, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.key, self.shard, self.reason)  # three arguments, so it survives process boundaries
