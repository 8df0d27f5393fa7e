#!/bin/sh
# Truncate a file while a device writes into its pinned blocks: truncate returns at once, the blocks stay the device's,
# and nobody else gets them until the pin goes.   usage: tools/scripts/truncate-pinned.sh MOUNT
set -eu
. "$(dirname "$0")/common.sh"
busy=$(count busy)

step "a file of 1 MiB, the first 256 KiB (64 blocks of 4096 bytes) pinned by a device that writes there all the time"
pattern "the file" 1048576 >"$work/file"
hold "$work/file" 0 256K

step "truncate it to nothing"
show truncate -s 0 "$work/file"
[ "$(stat -c %s "$work/file")" = 0 ] || fail "the file is not empty"
echo "the file has $(stat -c %s "$work/file") bytes"

step "its pinned blocks are busy now: no file owns them, the allocator does not have them"
show daxfs busy "$MNT"
expect "truncated" busy $((busy + 64))

step "fill all the free space with another file, the device still writing"
fill_up "$work/other"
sleep 0.5
check_filled "$work/other"

step "let the device go: the blocks are freed"
release
expect "unpinned" busy "$busy"

step "HOLDS: truncate did not wait, and no pinned block was used by anybody else"
