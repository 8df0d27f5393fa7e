"""The recording medium: all that the core stores, flushes and fences is in its record, and no read goes unseen."""

from __future__ import annotations

import numpy as np
import pytest

from daxfs.core import fileops, fsck, namespace
from daxfs.core.namespace import Caller
from daxfs.core.volume import Volume
from daxfs.lab.crash import calls
from daxfs.lab.crash.medium import Event, Fence, Flush, RecordingPmem, Return, Store

SIZE = 1 << 16


def lines(medium: RecordingPmem) -> list[int]:
    return np.flatnonzero(medium.seen).tolist()


def replayed(image: bytes, log: list[Event]) -> bytes:
    """The image after all stores of a record."""
    out = bytearray(image)
    for event in log:
        if isinstance(event, Store):
            out[event.at : event.at + len(event.data)] = event.data
    return bytes(out)


def test_what_is_done_is_written_down_in_order() -> None:
    medium = RecordingPmem(SIZE)
    medium.store(100, b"some bytes")
    medium.flush(100, 10)
    medium.store_word(256, 0x1122334455667788)
    medium.fill_zero(104, 3)
    medium.stream(320, b"past the caches")
    medium.copy(100, 512, 4)
    medium.fence()
    medium.returned(7)
    assert medium.log == [
        Store(100, b"some bytes"), Flush(100, 10), Store(256, bytes.fromhex("8877665544332211")), Store(104, bytes(3)),
        Store(320, b"past the caches", True), Store(512, b"some"), Fence(), Return(7),
    ]  # fmt: skip
    assert medium.load(100, 10) == b"some\0\0\0tes"
    assert medium.load_word(256) == 0x1122334455667788
    assert medium.load(320, 15) == b"past the caches"
    assert medium.load(512, 4) == b"some"


def test_every_way_to_read_is_seen() -> None:
    medium = RecordingPmem(SIZE)
    for read, expected in (
        (lambda: medium.load(64, 1), [1]),
        (lambda: medium.load(63, 2), [0, 1]),
        (lambda: medium.view[128:192], [2]),
        (lambda: medium.view[200], [3]),
        (lambda: medium.view[SIZE - 1 : SIZE + 100], [SIZE // 64 - 1]),
        (lambda: medium.load_word(64), [1]),
        (lambda: medium.words[8:17], [1, 2]),
        (lambda: medium.bytes[192:257], [3, 4]),
        (lambda: medium.gather(np.array([1, 3]), 4096), [*range(64, 128), *range(192, 256)]),
        (lambda: medium.reading(np.array([1, 4]), 2, 4096), [*range(64, 192), *range(256, 384)]),
        (lambda: medium.private().load(640, 64), [10]),
        (lambda: medium.copy(64, 0, 64), [1]),
    ):
        medium.clear()
        read()
        assert lines(medium) == expected


def test_what_was_overwritten_before_it_was_read_is_not_needed() -> None:
    medium = RecordingPmem(SIZE)
    medium.load(64, 1)
    medium.store(0, bytes(200))  # lines 0, 1, 2 and part of line 3
    medium.load(0, 256)
    medium.private().load(128, 64)
    assert lines(medium) == [0, 1, 2, 3]
    assert np.flatnonzero(medium.needed).tolist() == [1, 3]
    medium.clear()
    medium.load(0, 64)
    assert np.flatnonzero(medium.needed).tolist() == [0]


def test_nothing_gets_at_the_bytes_behind_its_back() -> None:
    medium = RecordingPmem(SIZE)
    for buffer in (medium.view, medium.words, medium.bytes):
        with pytest.raises(TypeError):
            memoryview(buffer)
        with pytest.raises(TypeError):
            buffer[0:8] = bytes(8)  # type: ignore[assignment]


def test_a_private_copy_keeps_its_stores_to_itself() -> None:
    medium = RecordingPmem(SIZE)
    medium.store(0, b"original")
    copy = medium.private()
    assert copy.readonly
    assert copy.load(0, 8) == b"original"
    copy.store(0, b"scribble")
    assert medium.load(0, 8) == b"original"
    assert medium.log == [Store(0, b"original")]


def test_the_record_of_the_core_is_complete() -> None:
    """Every call of the alphabet: what the record says is what the memory holds."""
    image = calls.base_image()
    medium = RecordingPmem(len(image))
    for call in calls.ALPHABET.values():
        medium.put(image)
        volume = Volume.open(medium, now=calls.START, boot_id=calls.BOOT)
        world = calls.World.begin(volume)
        calls.perform(world, call)
        assert replayed(image, medium.log) == bytes(medium.raw), call.name


def test_the_core_runs_on_it_as_on_a_file() -> None:
    image = calls.base_image()
    medium = RecordingPmem(len(image))
    medium.put(image)
    volume = Volume.open(medium, now=calls.START)
    inode = namespace.create(volume, calls.START, volume.root, b"made here", 0o644, Caller(0, 0))
    fileops.write(volume, calls.START, inode, 5, b"data")
    volume.check()
    assert not fsck.check(medium).errors
    volume.close(calls.START)
    again = Volume.open(medium, now=calls.START)
    assert again.last_shutdown == "clean"
    found = namespace.lookup(again, again.root, b"made here")
    assert found is not None
    assert fileops.read(again, found, 0, 100) == bytes(5) + b"data"
    again.check()
