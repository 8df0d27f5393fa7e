#!/bin/sh
# The Debian packages that daxfs needs: installs those that are missing (as root), or says what to install.
# usage: tools/system-packages.sh PYTHON [test|bench]
set -eu
python=$1
purpose=${2:-}
PATH=$PATH:/usr/sbin:/sbin

# need PACKAGE COMMAND...: the package is missing when the command fails
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

has_libc_headers() {
    echo '#include <linux/fuse.h>' | cc -E -
}

has_python_headers() {
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

look() {
    missing=
    need fuse3 command -v fusermount3
    need pkg-config command -v pkg-config
    need libfuse3-dev pkg-config --exists fuse3
    need gcc command -v cc
    need libc6-dev has_libc_headers
    if [ -n "$python" ]; then
        need python3-dev has_python_headers
        need python3-venv "$python" -c 'import ensurepip, venv'
    else
        missing="$missing python3 python3-dev python3-venv"
    fi
    if [ "$purpose" = test ]; then
        need fio command -v fio
        need xfsprogs command -v xfs_io
        need attr command -v setfattr
        need acl command -v setfacl
        need stress-ng command -v stress-ng
    fi
    if [ "$purpose" = bench ]; then
        need fio command -v fio
        need fuse2fs command -v fuse2fs
        need ntfs-3g command -v mkfs.ntfs
        need e2fsprogs command -v mkfs.ext4
    fi
}

look
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "daxfs needs system packages that are missing; as root: apt-get install$missing" >&2
    exit 1
fi
echo "installing system packages:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086 # one word per package
apt-get -qq install -y --no-install-recommends $missing >/dev/null

[ -n "$python" ] || python=python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "daxfs needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi
look
if [ -n "$missing" ]; then
    echo "still missing after the installation:$missing; $python may need packages of its own" >&2
    exit 1
fi
