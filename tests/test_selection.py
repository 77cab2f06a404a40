"""Rows of long tables that run in `make test` and in `make test-long`."""

import pytest

from tests.selection import LONG, chosen

TABLE = {"a": 1, "b": 2, "c": 3}


def test_some_rows_run_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LONG, raising=False)
    assert chosen(TABLE, "c", "a") == {"c": 3, "a": 1}
    with pytest.raises(KeyError):
        chosen(TABLE, "a row that was renamed")
    monkeypatch.setenv(LONG, "1")
    assert chosen(TABLE, "c", "a") == TABLE
