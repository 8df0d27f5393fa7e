#!/bin/sh
# Punch a hole over pinned blocks: the file reads zeros there, the device keeps its blocks, and what is written into the
# hole goes to other ones.   usage: tools/scripts/punch-pinned.sh MOUNT
set -eu
. "$(dirname "$0")/common.sh"
busy=$(count busy)

step "a file of 1 MiB; a device has pinned its second 256 KiB and writes there all the time"
pattern "the file" 1048576 >"$work/file"
cp "$work/file" "$notes/copy"
hold "$work/file" 256K 256K
show daxfs extents "$work/file"

step "punch a hole there"
show fallocate --punch-hole --offset 256KiB --length 256KiB "$work/file"
show daxfs extents "$work/file"
expect "punched" busy $((busy + 64))

step "the hole reads zeros, the rest of the file is as it was"
cmp -n 262144 "$work/file" "$notes/copy" || fail "the part before the hole has changed"
cmp -n 262144 -i 262144:0 "$work/file" /dev/zero || fail "the hole does not read as zeros"
cmp -i 524288 "$work/file" "$notes/copy" || fail "the part behind the hole has changed"
echo "cmp: all as it should be"

step "write into the hole: the file gets new blocks, the device never sees these bytes nor the file those of the device"
pattern "new data" 262144 >"$notes/new"
show dd if="$notes/new" of="$work/file" bs=256K seek=1 conv=notrunc status=none
show daxfs extents "$work/file"
sleep 0.5
cmp -n 262144 -i 262144:0 "$work/file" "$notes/new" || fail "the device wrote into the file"
echo "cmp: the new data is untouched"

step "let the device go: the old blocks are freed"
release
expect "unpinned" busy "$busy"

step "HOLDS: the hole was punched at once, and the pinned blocks stayed with the device alone"
