/*
 * Made by tools/c_header.py from daxfs/abi.py: change that.
 *
 * The pin ABI: ioctl numbers, structures, flags. Client and daemon share this module and nothing else.
 *
 * A pin belongs to an open file description: `ioctl(fd, IOC_PIN, buffer)` on a regular file of the mount. The last close of
 * that description releases it. Offsets and lengths of calls are bytes; runs are (start block, count) on the image.
 * Reports (IOC_REPORT) are asked of the root directory of the mount, or of any file or directory in it.
 *
 * Numbers are made as `_IOC` of `<asm-generic/ioctl.h>` makes them, type byte 0xDA. Structures are little-endian, without
 * padding. Only the standard library is imported here: this module runs inside other people's processes.
 *
 * Every ioctl both takes and gives its structure. Members that are called zero must be 0.
 */
#ifndef DAXFS_H
#define DAXFS_H

#include <linux/ioctl.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "daxfs runs on little-endian machines only"
#endif

#ifdef __cplusplus
#define DAXFS_SIZE(name, size) static_assert(sizeof(struct name) == (size), "the size of an ABI structure")
#else
#define DAXFS_SIZE(name, size) _Static_assert(sizeof(struct name) == (size), "the size of an ABI structure")
#endif

#define DAXFS_ABI_VERSION 1
#define DAXFS_IOC_TYPE 0xdau

/*
 * Flags of PIN; the kernel's names and rules (include/linux/mm_types.h).
 */
#define DAXFS_FOLL_WRITE 0x1u
#define DAXFS_FOLL_GET 0x2u
#define DAXFS_FOLL_LONGTERM 0x100u
#define DAXFS_FOLL_PIN 0x80000u

/*
 * Two of our own. NOWAIT: EAGAIN instead of waiting behind a truncate of the range. ON_DEMAND: no pin but a registration that
 * is told before its blocks go (IB_ACCESS_ON_DEMAND); neither FOLL_PIN nor FOLL_GET go with it.
 */
#define DAXFS_PIN_NOWAIT 0x40000000u
#define DAXFS_PIN_ON_DEMAND 0x80000000u
#define DAXFS_PIN_FLAGS 0xc0080103u

/*
 * Flags of open(2) for whoever will pin: with dax=never the file does without the page cache as long as such a descriptor is
 * open, if it was closed before. O_NONBLOCK means nothing else to a regular file. Without dax=never it makes no difference.
 * (For C: <fcntl.h> with _GNU_SOURCE has the two.)
 */
#define DAXFS_O_PIN (O_DIRECT | O_NONBLOCK)

/*
 * PIN: in: offset, length (bytes, block aligned), flags. out: id, how many runs, how many blocks. PIN_RUNS has the runs.
 * Errors: EINVAL (misaligned, empty, flags), EACCES (the descriptor is not open for reading, or for a write pin not for
 * writing), ENXIO (beyond the end of file), EFAULT (read pin of a hole), EIO (poisoned blocks), ENODEV (the device is being
 * removed), EISDIR/EINVAL (not a regular file), ENOMEM (limit), ENOSPC (write pin of a hole, volume full), EBUSY (dax=never:
 * the file is open through the page cache: open it with O_PIN when it is closed everywhere else).
 */
struct daxfs_pin {
	uint64_t offset;
	uint64_t length;
	uint32_t flags;
	uint32_t zero;
	uint64_t id;
	uint64_t runs;
	uint64_t blocks;
};
DAXFS_SIZE(daxfs_pin, 48);
#define DAXFS_IOC_PIN _IOWR(DAXFS_IOC_TYPE, 1, struct daxfs_pin)

/*
 * UNPIN: in: id, flags (UNPIN_DIRTY: the device wrote; the file system dirties the file). Errors: ENOENT (no such pin here).
 */
struct daxfs_unpin {
	uint64_t id;
	uint32_t flags;
	uint32_t zero;
};
DAXFS_SIZE(daxfs_unpin, 16);
#define DAXFS_IOC_UNPIN _IOWR(DAXFS_IOC_TYPE, 2, struct daxfs_unpin)
#define DAXFS_UNPIN_DIRTY 1

/*
 * Paged answers: a header, then as many records as fit. `first` is the index of the first record wanted; the answer has how
 * many are in it and how many there are in all.
 */
struct daxfs_page {
	uint64_t key; /* pin id, or 0 */
	uint64_t first;
	uint32_t count;
	uint32_t total;
};
DAXFS_SIZE(daxfs_page, 24);
#define DAXFS_PAGE_BYTES 8192

/*
 * PIN_RUNS: key = pin id; records of RUN.
 * EXTENTS: key = first logical block wanted (`first` is not used, 0); records of EXTENT.
 */
struct daxfs_run {
	uint64_t start_block;
	uint64_t count;
};
DAXFS_SIZE(daxfs_run, 16);
struct daxfs_run_page {
	struct daxfs_page page;
	struct daxfs_run records[510];
	unsigned char rest[8];
};
DAXFS_SIZE(daxfs_run_page, DAXFS_PAGE_BYTES);
#define DAXFS_IOC_PIN_RUNS _IOC(_IOC_READ | _IOC_WRITE, DAXFS_IOC_TYPE, 3, DAXFS_PAGE_BYTES)

struct daxfs_extent {
	uint64_t logical;
	uint64_t physical;
	uint64_t count;
	uint32_t unwritten;
	uint32_t zero;
};
DAXFS_SIZE(daxfs_extent, 32);
struct daxfs_extent_page {
	struct daxfs_page page;
	struct daxfs_extent records[255];
	unsigned char rest[8];
};
DAXFS_SIZE(daxfs_extent_page, DAXFS_PAGE_BYTES);
#define DAXFS_IOC_EXTENTS _IOC(_IOC_READ | _IOC_WRITE, DAXFS_IOC_TYPE, 4, DAXFS_PAGE_BYTES)

/*
 * PAGES: what struct page would say of each block. key = pin id, first = index of the first block of it wanted; or key 0,
 * first = first logical block of the file wanted, holes are left out. Records of PAGE_STATE; total: blocks of the pin, or 0.
 * pins: FOLL_PIN holders of the block; references: those, FOLL_GET holders, and 1 for the file if it (still) has the block.
 */
struct daxfs_page_state {
	uint64_t index; /* in the pin, or logical block of the file */
	uint64_t physical;
	uint32_t pins;
	uint32_t references;
};
DAXFS_SIZE(daxfs_page_state, 24);
struct daxfs_page_state_page {
	struct daxfs_page page;
	struct daxfs_page_state records[340];
	unsigned char rest[8];
};
DAXFS_SIZE(daxfs_page_state_page, DAXFS_PAGE_BYTES);
#define DAXFS_IOC_PAGES _IOC(_IOC_READ | _IOC_WRITE, DAXFS_IOC_TYPE, 12, DAXFS_PAGE_BYTES)

/*
 * LEASE: a layout lease of the description. in: offset, length (bytes; length 0: the whole file), op. Errors: EINVAL, ENOMEM
 * (limit).
 */
struct daxfs_lease {
	uint64_t offset;
	uint64_t length;
	uint32_t op;
	uint32_t zero;
};
DAXFS_SIZE(daxfs_lease, 24);
#define DAXFS_IOC_LEASE _IOWR(DAXFS_IOC_TYPE, 6, struct daxfs_lease)
#define DAXFS_LEASE_TAKE 1
#define DAXFS_LEASE_RELEASE 2

/*
 * NEXT_EVENT: out: the oldest event of this description. Errors: EAGAIN (there is none; poll(2) says POLLPRI when there is).
 */
struct daxfs_event {
	uint32_t type;
	uint32_t lost; /* events dropped before this one */
	uint64_t pin_id; /* 0: a lease */
	uint64_t offset;
	uint64_t length;
};
DAXFS_SIZE(daxfs_event, 32);
#define DAXFS_IOC_NEXT_EVENT _IOWR(DAXFS_IOC_TYPE, 7, struct daxfs_event)
#define DAXFS_EVENT_INVALIDATE 1 /* on demand: stop using the range, then ACK */
#define DAXFS_EVENT_LEASE_BREAK 2 /* somebody waits for the range: unpin, or release the lease */
#define DAXFS_EVENT_REVOKED 3 /* the pin's access is gone; unpin it */
#define DAXFS_EVENT_DEVICE_REMOVE 4 /* the device goes away: unpin everything (pin id 0) */
#define DAXFS_EVENT_POISON 5 /* the medium failed under the range */

/*
 * ACK: an on-demand registration has let go. in: pin id. Errors: ENOENT, EINVAL (nothing to acknowledge).
 */
struct daxfs_ack {
	uint64_t id;
	uint64_t zero;
};
DAXFS_SIZE(daxfs_ack, 16);
#define DAXFS_IOC_ACK _IOWR(DAXFS_IOC_TYPE, 8, struct daxfs_ack)

/*
 * ADMIN: for root and for whoever mounted. in: op, flags, two arguments; a and b come back with an answer.
 * Errors: EPERM, EINVAL, ENOENT, ENODEV (the device is removed).
 */
struct daxfs_admin {
	uint32_t op;
	uint32_t flags;
	uint64_t a;
	uint64_t b;
};
DAXFS_SIZE(daxfs_admin, 24);
#define DAXFS_IOC_ADMIN _IOWR(DAXFS_IOC_TYPE, 9, struct daxfs_admin)

/*
 * RELEASE_PIN, a: pin id. Its holder gets EVENT_REVOKED; blocks that it may still have mapped stay with it till it closes.
 * A survivor (of an earlier daemon) goes for good when its holder has ended, or with ADMIN_FORCE; else EBUSY. out: a: 1 if
 * it went for good, b: blocks that it keeps.
 */
#define DAXFS_ADMIN_RELEASE_PIN 1
#define DAXFS_ADMIN_REAP_BUSY 2 /* release survivors whose holders have ended, free what is due; out: blocks freed, survivors released */

/*
 * DEVICE_REMOVE, a: milliseconds to drain (ADMIN_FORCE: none, revoke at once). It goes on after the call; REPORT_DEVICE
 * shows how far it is. Again: the earlier end counts. out: a: pins that are left.
 */
#define DAXFS_ADMIN_DEVICE_REMOVE 3
#define DAXFS_ADMIN_POISON 4 /* a: first block, b: count; out: a: files that have some of them, b: 1 if metadata is among them */
#define DAXFS_ADMIN_CLEAR_POISON 5 /* likewise */
#define DAXFS_ADMIN_FORCE 1

/*
 * CHANGE: a layout change that does not wait. in: offset (TRUNCATE: the size), length, op, flags. Errors: as truncate(2) and
 * fallocate(2), EAGAIN with CHANGE_NOWAIT where those would wait, and EOPNOTSUPP with dax=never.
 */
struct daxfs_change {
	uint64_t offset;
	uint64_t length;
	uint32_t op;
	uint32_t flags;
};
DAXFS_SIZE(daxfs_change, 24);
#define DAXFS_IOC_CHANGE _IOWR(DAXFS_IOC_TYPE, 10, struct daxfs_change)
#define DAXFS_CHANGE_TRUNCATE 1
#define DAXFS_CHANGE_PUNCH 2
#define DAXFS_CHANGE_NOWAIT 1

/*
 * HCA: the simulated RDMA adapter; its calls are in abi_hca.py.
 */
#define DAXFS_IOC_HCA _IOC(_IOC_READ | _IOC_WRITE, DAXFS_IOC_TYPE, 11, DAXFS_PAGE_BYTES)

/*
 * LABEL: a name of the holder's own for one of its pins, for whoever looks at the list. in: pin id, UTF-8 up to the first
 * NUL. Errors: ENOENT.
 */
struct daxfs_label {
	uint64_t id;
	char text[56];
};
DAXFS_SIZE(daxfs_label, 64);
#define DAXFS_IOC_LABEL _IOWR(DAXFS_IOC_TYPE, 13, struct daxfs_label)

/*
 * Reports of the daemon, as JSON (UTF-8): `first` is a byte offset into the text, the records are bytes, `total` its length.
 * Which report: `key`. A client reads until it has `total` bytes; offset 0 makes a new text for this description.
 * Errors: ESTALE (too many are being read at once, the text was dropped: start again).
 */
#define DAXFS_IOC_REPORT _IOC(_IOC_READ | _IOC_WRITE, DAXFS_IOC_TYPE, 5, DAXFS_PAGE_BYTES)
#define DAXFS_REPORT_INFO 1
#define DAXFS_REPORT_PINS 2
#define DAXFS_REPORT_BUSY 3
#define DAXFS_REPORT_STATUS 4
#define DAXFS_REPORT_DEVICE 5

#endif
