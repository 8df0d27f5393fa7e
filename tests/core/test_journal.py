"""The redo journal: whole or absent, again and again the same, and no bytes of it are believed unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from daxfs.core import layout
from daxfs.core.journal import Journal
from daxfs.core.layout import JOURNAL_COMMIT_AT, JOURNAL_HEADER, TXN_HEADER, TXN_RECORD
from daxfs.core.pmem import Pmem
from daxfs.errors import Corrupt, NoSpace

from .power import DyingPmem, PowerLoss

B = 4096
START, BLOCKS = 2, 4
HEADER = START * B
WORD = HEADER + JOURNAL_COMMIT_AT
BODY = HEADER + B
END = (START + BLOCKS) * B
SIZE = 16 * B


@pytest.fixture
def pmem(tmp_path: Path) -> Iterator[DyingPmem]:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    medium = DyingPmem(path)
    Journal(medium, START, BLOCKS, B).format()
    yield medium
    medium.close()


def journal(pmem: Pmem) -> Journal:
    return Journal(pmem, START, BLOCKS, B)


def outside(pmem: Pmem) -> bytes:
    """All but the journal."""
    return pmem.load(0, HEADER) + pmem.load(END, SIZE - END)


targets = st.integers(END, SIZE - 600)
record_lists = st.lists(st.tuples(targets, st.binary(min_size=1, max_size=600)), max_size=8)


@given(records=record_lists)
def test_commit_applies_all_in_order(pmem: DyingPmem, records: list[tuple[int, bytes]]) -> None:
    want = bytearray(pmem.load(0, SIZE))
    for at, data in records:
        want[at : at + len(data)] = data
    journal(pmem).commit(records)
    assert outside(pmem) == bytes(want[:HEADER] + want[END:])
    assert pmem.load_word(WORD) == 0
    again = journal(pmem)
    assert again.pending() == []
    assert not again.replay()


@given(records=st.lists(st.tuples(targets, st.binary(min_size=1, max_size=60)), min_size=1, max_size=6),
       left=st.integers(0, 16), torn=st.booleans())  # fmt: skip
def test_a_crash_leaves_all_or_nothing(pmem: DyingPmem, records: list[tuple[int, bytes]], left: int, torn: bool) -> None:
    before = outside(pmem)
    want = bytearray(pmem.load(0, SIZE))
    for at, data in records:
        want[at : at + len(data)] = data
    after = bytes(want[:HEADER] + want[END:])
    pmem.left, pmem.torn = left, torn
    done = False
    try:
        journal(pmem).commit(records)
        done = True
    except PowerLoss:
        pass
    pmem.left = None
    committed = pmem.load_word(WORD) != 0
    assert journal(pmem).replay() == committed
    assert outside(pmem) == (after if committed or done or left >= 3 else before)
    assert not journal(pmem).replay()


def test_the_commit_word_is_the_commit_point(pmem: DyingPmem) -> None:
    """Two stores: the body, the word. What dies before the second is absent."""
    seen = []
    for left in range(3):
        pmem.store(END, b"old")
        pmem.left = left
        with pytest.raises(PowerLoss):
            journal(pmem).commit([(END, b"new")])
        pmem.left = None
        journal(pmem).replay()
        seen.append(pmem.load(END, 3))
    assert seen == [b"old", b"old", b"new"]


def test_replay_is_idempotent(pmem: DyingPmem) -> None:
    """Replayed, half replayed, replayed twice: the same image."""
    records = [(END, b"a" * 100), (END + 50, b"b" * 100), (END + 300, b"c" * 9)]
    pmem.left = 2
    with pytest.raises(PowerLoss):
        journal(pmem).commit(records)
    committed = pmem.load(0, SIZE)
    pmem.left = None
    assert journal(pmem).replay()
    whole = pmem.load(0, SIZE)
    for left in range(4):
        pmem.store(0, committed)
        for torn in (True, False):
            pmem.left, pmem.torn = left, torn
            with pytest.raises(PowerLoss):
                journal(pmem).replay()
        pmem.left = None
        assert journal(pmem).replay()
        assert pmem.load(0, SIZE) == whole


def test_replay_of_nothing_clears_the_word(pmem: DyingPmem) -> None:
    pmem.left = 2
    with pytest.raises(PowerLoss):
        journal(pmem).commit([])
    pmem.left = None
    assert pmem.load_word(WORD)
    assert not journal(pmem).replay()
    assert pmem.load_word(WORD) == 0


def test_sequences_rise_over_mounts(pmem: DyingPmem) -> None:
    first = journal(pmem)
    for _ in range(3):
        first.commit([(END, b"x")])
    again = journal(pmem)
    again.pending()
    assert again.sequence == first.sequence == 4


def test_a_transaction_as_large_as_the_journal_and_one_larger(pmem: DyingPmem) -> None:
    j = journal(pmem)
    j.commit([(END, bytes(j.capacity - TXN_RECORD.size))])
    before = pmem.load(0, SIZE)
    with pytest.raises(NoSpace, match="does not fit the journal"):
        j.commit([(END, b"x" * (j.capacity - TXN_RECORD.size + 1))])
    assert pmem.load(0, SIZE) == before


# -- hostile journals --


def body(records: list[tuple[int, int, bytes]], *, sequence: int = 9, count: int | None = None, length: int | None = None
         ) -> bytes:  # fmt: skip
    """A transaction with a right checksum, whatever its records claim: (address, length, bytes)."""
    data = b"".join(TXN_RECORD.struct.pack(at, n) + b + bytes(-len(b) % 8) for at, n, b in records)
    header = TXN_HEADER.struct.pack(layout.TXN_MAGIC, 0, sequence, len(data) if length is None else length,
                                    len(records) if count is None else count)  # fmt: skip
    crc = crc32c(data, crc32c(header[8:], crc32c(header[:4])))
    return header[:4] + crc.to_bytes(4, "little") + header[8:] + data


HOSTILE = {
    "outside the image": body([(SIZE - 3, 4, b"abcd")]),
    "far outside the image": body([((1 << 64) - 1, 8, bytes(8))]),
    "into the journal header": body([(HEADER, 8, bytes(8))]),
    "into the commit word": body([(WORD, 8, bytes(8))]),
    "into the journal's last byte": body([(END - 1, 8, bytes(8))]),
    "over the whole journal": body([(HEADER - 8, 16, bytes(16))]),
    "a length beyond the transaction": body([(END, 100, bytes(8))]),
    "a huge length": body([(END, (1 << 64) - 8, bytes(8))]),
    "too many records": body([(END, 8, bytes(8))], count=2),
    "too few records": body([(END, 8, bytes(8)), (END, 8, bytes(8))], count=1),
    "a length that is no multiple of 8": body([(END, 8, bytes(8))], length=23),
    "longer than the journal": body([(END, 8, bytes(8))], length=1 << 40),
    "another sequence": body([(END, 8, bytes(8))], sequence=8),
    "another magic": b"XXXX" + body([(END, 8, bytes(8))])[4:],
    "a bad checksum": body([(END, 8, bytes(8))])[:-1] + b"x",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_body_is_refused(pmem: DyingPmem, what: str) -> None:
    pmem.store(BODY, HOSTILE[what])
    pmem.store_word(WORD, 9)
    before = pmem.load(0, SIZE)
    with pytest.raises(Corrupt, match="journal"):
        journal(pmem).replay()
    assert pmem.load(0, SIZE) == before


def test_the_same_body_without_malice_is_applied(pmem: DyingPmem) -> None:
    pmem.store(BODY, body([(END, 8, b"goodgood")]))
    pmem.store_word(WORD, 9)
    assert journal(pmem).replay()
    assert pmem.load(END, 8) == b"goodgood"


@pytest.mark.parametrize("header", [
    bytes(32),
    layout.seal(JOURNAL_HEADER.pack(magic=layout.JOURNAL_MAGIC, crc=0, address=HEADER + 8, body_blocks=3, reserved=0)),
    layout.seal(JOURNAL_HEADER.pack(magic=layout.TXN_MAGIC, crc=0, address=HEADER, body_blocks=3, reserved=0)),
], ids=["zeros", "of another place", "another magic"])  # fmt: skip
def test_a_header_that_is_none(pmem: DyingPmem, header: bytes) -> None:
    pmem.store(HEADER, header)
    with pytest.raises(Corrupt, match="journal header"):
        journal(pmem).pending()


@given(word=st.integers(0, 3), junk=st.binary(max_size=200), at=st.integers(0, 64))
def test_any_bytes_are_taken_or_refused(pmem: DyingPmem, word: int, junk: bytes, at: int) -> None:
    good = body([(END, 8, bytes(8))], sequence=1)
    pmem.store(BODY, bytes(1000))
    pmem.store(BODY, good)
    pmem.store(BODY + at, junk)
    pmem.store_word(WORD, word)
    before = outside(pmem)
    try:
        journal(pmem).replay()
    except Corrupt:
        assert outside(pmem) == before
