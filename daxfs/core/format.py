"""mkfs: an empty volume on an image file.

The superblocks are written last and copy A at the very end, so an interrupted mkfs leaves something that does not mount.
"""

from __future__ import annotations

import mmap
import os
import stat
import uuid as uuids

from daxfs.core import layout
from daxfs.core.journal import Journal
from daxfs.core.layout import BLOCK_SIZES, CHUNK_INODES, IMAGE_SIZE_MIN, INODE, INODE_SIZE, ROOT_INO
from daxfs.core.ledger import block_header
from daxfs.core.pmem import Pmem
from daxfs.core.superblock import Superblock, store
from daxfs.errors import ImageError

JOURNAL_BYTES_MIN, JOURNAL_BYTES_MAX = 64 << 10, 4 << 20


def format_image(path: str | os.PathLike[str], size: int, *, block_size: int = layout.BLOCK_SIZE, label: str = "",
                 uuid: bytes | None = None, now: int, uid: int = 0, gid: int = 0, mode: int = 0o755) -> None:  # fmt: skip
    """Make `path` a sparse image of `size` bytes (rounded down to blocks) with an empty volume; what was in it is gone.

    The root directory gets `uid`, `gid` and `mode`. ImageError says what is wrong with the arguments or the place.
    """
    path = os.fspath(path)
    if block_size not in BLOCK_SIZES:
        raise ImageError(f"a block size of {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if size < IMAGE_SIZE_MIN:
        raise ImageError(f"{size} bytes are too small for a volume; give it at least {IMAGE_SIZE_MIN} (1M)")
    if len(label.encode()) > 64:
        raise ImageError("the label has more than 64 bytes")
    blocks = size // block_size
    sb = plan(blocks, block_size)
    _make_sparse(path, blocks * block_size)
    pmem = Pmem(path)
    try:
        sb.update(uuid=uuid or uuids.uuid4().bytes, label=label.encode(), created=now)
        Journal(pmem, sb["journal_start"], sb["journal_blocks"], block_size).format()
        _make_root(pmem, sb, now, uid, gid, mode)
        pmem.store(sb["ledger"] * block_size, block_header(sb["ledger"], bytes(16)))
        pmem.flush(0, (sb["ledger"] + 1) * block_size)
        pmem.fence()
        store(pmem, sb)
        store(pmem, sb)
        pmem.sync()
    finally:
        pmem.close()


def plan(blocks: int, block_size: int) -> Superblock:
    """Where everything goes. ImageError if there is no room for a volume."""
    sb: Superblock = dict.fromkeys(layout.SUPERBLOCK.names, 0)
    sb.update(kind=layout.SB_KIND, version=layout.MEDIA_VERSION, block_size=block_size, blocks=blocks,
              state=layout.STATE_CLEAN, boot_id=bytes(16), reserved=b"", journal_start=2)  # fmt: skip
    journal_bytes = min(JOURNAL_BYTES_MAX, max(JOURNAL_BYTES_MIN, blocks * block_size // 64))
    sb["journal_blocks"] = max(4, 1 + journal_bytes // block_size)  # room for the two edge blocks of a punch
    sb["idir_start"] = sb["journal_start"] + sb["journal_blocks"]
    chunks = blocks // layout.chunk_blocks(block_size)
    sb["idir_blocks"] = -(-chunks * 8 // block_size)
    sb["data_start"] = sb["idir_start"] + sb["idir_blocks"]
    sb["ledger"] = sb["data_start"] + layout.chunk_blocks(block_size)
    if sb["ledger"] + 8 > blocks:
        raise ImageError(f"{blocks} blocks of {block_size} bytes are too few for a volume; make the image larger")
    return sb


def _make_root(pmem: Pmem, sb: Superblock, now: int, uid: int, gid: int, mode: int) -> None:
    block_size, chunk = sb["block_size"], sb["data_start"]
    # All the rest is zeros: the file is new, and stays sparse.
    time = layout.time_word(now)
    values: dict[str, int | bytes] = dict.fromkeys(INODE.names, 0)
    values.update(magic=layout.INODE_MAGIC, ino=ROOT_INO, generation=1, mode=stat.S_IFDIR | mode, uid=uid, gid=gid,
                  nlink=2, parent=ROOT_INO, body=b"", xattrs=b"", btime=time, mtime=time, ctime=time,
                  atime=time)  # fmt: skip
    record = layout.seal(INODE.pack(**values), end=layout.INODE_CRC_END)
    assert ROOT_INO < CHUNK_INODES
    pmem.store(chunk * block_size + ROOT_INO * INODE_SIZE, record)
    pmem.store_word(sb["idir_start"] * block_size, layout.idir_word(0, chunk))


def _make_sparse(path: str, size: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except IsADirectoryError:
        raise ImageError(f"{path} is a directory, not an image; name a file") from None
    except OSError as e:
        raise ImageError(f"cannot make the image {path}: {e.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{path} is not a regular file; name one")
        pmem_in_use = Pmem(path) if os.fstat(fd).st_size >= mmap.PAGESIZE else None  # takes the lock, or says who has it
        if pmem_in_use:
            pmem_in_use.close()
        os.ftruncate(fd, max(size, os.fstat(fd).st_size))  # before anything is lost: is such a size possible here?
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as e:
        why = e.strerror if isinstance(e, OSError) else "no file can be as large"
        raise ImageError(f"cannot make the image {path} of {size} bytes: {why}") from None
    finally:
        os.close(fd)
