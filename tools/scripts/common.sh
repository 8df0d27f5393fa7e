# Sourced by the scripts here: finds daxfs, makes a directory to work in, starts and stops the holder, cleans up.

MNT=${1:?"usage: $0 MOUNT (a daxfs mount, see: daxfs mount --help)"}
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:$here/../../.venv/bin
command -v daxfs >/dev/null || { echo "$0: no daxfs in PATH, nor in .venv/bin: run make install" >&2; exit 1; }
daxfs info "$MNT" >/dev/null || exit 1

work=$(mktemp -d "$MNT/pinned.XXXXXX")
notes=$(mktemp -d)
holder=
trap 'status=$?; [ -z "$holder" ] || kill "$holder" && wait; rm -rf "$work" "$notes"; exit $status' EXIT
trap 'exit 1' HUP INT TERM

step() { echo; echo "== $*"; }
show() { echo "\$ $*"; "$@"; }
fail() { echo "FAILED: $*"; exit 1; }

# pattern WORD BYTES: that many bytes of the word, line by line.
pattern() { yes "$1" | head -c "$2"; }

# count NAME: the number of free, used, busy or pinned blocks of the mount.
count() { daxfs info --json "$MNT" | sed -n "s/^ *\"$1\": \([0-9]*\),*$/\1/p"; }

# expect WHAT NAME NUMBER: wait (the delayed free is a worker's) till the count is that.
expect() {
    tries=50
    while [ "$(count "$2")" != "$3" ]; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "$1: $2 is $(count "$2") blocks, not $3"
        sleep 0.1
    done
    echo "$1: $2 is $3 blocks"
}

# hold FILE OFFSET LENGTH: a device that pins the range and keeps writing the byte 0xa5 into the blocks, in the background.
hold() {
    echo "\$ daxfs pin --offset $2 --length $3 --fill 0xa5 $1 &"
    daxfs pin --offset "$2" --length "$3" --fill 0xa5 "$1" >"$notes/holder" 2>"$notes/messages" &
    holder=$!
    until [ -s "$notes/holder" ]; do
        kill -0 "$holder" 2>/dev/null || { holder=; fail "$(cat "$notes/messages")"; }
        sleep 0.1
    done
    cat "$notes/holder"
}

# release: stop the device; it reports whether it ever saw a byte in its blocks that it had not written.
release() {
    kill "$holder"
    status=0
    wait "$holder" || status=$?
    holder=
    tail -n 1 "$notes/holder"
    cat "$notes/messages"
    [ $status = 0 ] || fail "the device saw bytes that were not its own"
}

# fill_up FILE: a file of a known pattern that takes all free space, 1 GiB at most.
fill_up() {
    pattern "nobody else's data" 1073741824 | dd of="$1" bs=1M iflag=fullblock status=none 2>/dev/null || true
    echo "$1 takes $(stat -c %s "$1") bytes, $(count free) blocks are free now"
}

# check_filled FILE: not a byte of it has changed.
check_filled() {
    pattern "nobody else's data" "$(stat -c %s "$1")" | cmp - "$1" || fail "$1 was written into by the device"
    echo "cmp: not a byte of it has changed"
}
