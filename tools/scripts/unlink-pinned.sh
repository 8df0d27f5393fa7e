#!/bin/sh
# Unlink a file while a device writes into its pinned blocks. Kernels before 6.15 free them at the last close, under the
# device; here they stay busy until the pin goes.   usage: tools/scripts/unlink-pinned.sh MOUNT
set -eu
. "$(dirname "$0")/common.sh"
busy=$(count busy)

step "a file of 1 MiB, all of it pinned by a device that writes there all the time"
pattern "the file" 1048576 >"$work/file"
hold "$work/file" 0 1M

step "unlink it"
show rm "$work/file"
[ ! -e "$work/file" ] || fail "the name is still there"
show daxfs pins "$MNT"
expect "unlinked" busy $((busy + 256))

step "a new file of the same name gets other blocks; then all the free space is filled, the device still writing"
pattern "a new file" 1048576 >"$work/file"
show daxfs extents "$work/file"
fill_up "$work/other"
sleep 0.5
check_filled "$work/other"
pattern "a new file" 1048576 | cmp - "$work/file" || fail "the device wrote into the new file"

step "let the device go: the 256 blocks are freed"
free=$(count free)
release
expect "released" busy "$busy"
expect "released" free $((free + 256))

step "HOLDS: the name went at once, the blocks only with the pin"
