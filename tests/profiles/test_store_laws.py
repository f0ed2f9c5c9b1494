"""The store against a dict, under every order of appending, closing, dying and merging."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from profiles.errors import DataError
from profiles.journal import _encode, journal_path
from profiles.records import ProfileRecord
from profiles.store import ProfileStore, merge
from tests.profiles.strategies import record

numbers = st.integers(0, 6)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.lives = 0
        self.path = self.root / "0" / "profile.parquet"
        self.store = ProfileStore(self.path)
        self.expected: dict[str, ProfileRecord] = {}

    @rule(number=numbers)
    def append(self, number: int) -> None:
        entry = record(number)
        assert self.store.append(entry) == (entry.key not in self.expected)
        self.expected[entry.key] = entry

    @rule(number=numbers)
    def append_what_disagrees(self, number: int) -> None:
        entry = record(number, latency_us=41.75 + number)
        if entry.key in self.expected:
            with pytest.raises(DataError, match="in an earlier row"):
                self.store.append(entry)

    @rule()
    def open_and_close(self) -> None:
        self.store.open()
        self.store.close()
        assert not journal_path(self.path).exists()

    @rule(in_flight=st.binary(max_size=3) | st.integers(1, 400))
    def die(self, in_flight: bytes | int) -> None:
        """What is on disk at any moment goes on elsewhere, with part of a row behind it."""
        self.lives += 1
        folder = self.root / str(self.lives)
        if self.path.parent.exists():
            shutil.copytree(self.path.parent, folder)
        self.store.close()
        self.path = folder / self.path.name
        self.store = ProfileStore(self.path)
        journal = journal_path(self.path)
        if journal.exists():
            line = _encode(record(99).to_row())
            torn = (
                line[: min(in_flight, len(line) - 1)] if isinstance(in_flight, int) else in_flight.replace(b"\n", b"")
            )
            with journal.open("ab") as file:
                file.write(torn)

    @rule(others=st.sets(numbers))
    def merge_with(self, others: set[int]) -> None:
        self.store.close()
        other = self.root / "other.parquet"
        other.unlink(missing_ok=True)
        with ProfileStore(other) as store:
            for number in others:
                store.append(record(number))
        self.expected = {record(number).key: record(number) for number in others} | self.expected
        if others:
            assert merge([other], self.path) == len(self.expected)

    @invariant()
    def the_store_has_what_was_appended(self) -> None:
        found = {entry.key: entry for entry in ProfileStore(self.path).load()}
        assert found == self.expected

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)


StoreMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestStore = StoreMachine.TestCase
