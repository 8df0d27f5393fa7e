"""`-o`: what is understood, what is refused, what libfuse gets."""

from __future__ import annotations

import os

import pytest

from daxfs.daemon.options import MountOptions, _ranges
from daxfs.errors import BadArgument, FsError, NotPermitted


def parse(*given: str, privileged: bool = True) -> MountOptions:
    return MountOptions.parse(given, privileged=privileged)


def test_nothing_given_is_read_write_and_hot() -> None:
    options = parse(privileged=False)
    assert (options.readonly, options.nonempty, options.hostsync, options.hotpath) == (False, False, False, True)
    assert options.kernel == frozenset()


def test_root_gets_suid_and_dev_as_with_mount_8() -> None:
    assert parse().kernel == {"suid", "dev"}
    assert parse("nosuid,nodev").kernel == {"nosuid", "nodev"}
    assert parse("nosuid", "nodev,dev").kernel == {"nosuid", "dev"}


def test_lists_and_repeated_options() -> None:
    options = parse("ro,allow_other", "noexec,,nonempty", "hotpath=off", "hostsync", "defaults,default_permissions")
    assert options.readonly
    assert options.nonempty
    assert options.hostsync
    assert not options.hotpath
    assert options.kernel == {"ro", "allow_other", "noexec", "suid", "dev"}


def test_of_opposites_the_last_one_counts() -> None:
    assert not parse("ro,rw").readonly
    assert parse("rw,ro").readonly
    assert parse("hotpath=off,hotpath=on").hotpath
    assert "sync" not in parse("sync,async").kernel


def test_how_the_daemon_runs() -> None:
    first = min(os.sched_getaffinity(0))
    assert (parse().cpu, parse().spin_us) == (None, 100)
    assert (parse(f"cpu={first},spin_us=0").cpu, parse("spin_us=0").spin_us) == (first, 0)
    with pytest.raises(BadArgument, match=r"no such CPU for this process; there are: \d"):
        parse("cpu=1234")


def test_ranges_of_cpus() -> None:
    assert _ranges({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert _ranges({3}) == "3"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("foo", "unknown option 'foo'"),
        ("allow_root", "unknown option 'allow_root'"),
        ("ro=1", "takes no value"),
        ("nonempty=", "takes no value"),
        ("hotpath", "hotpath is one of on, off"),
        ("hotpath=maybe", "hotpath is one of on, off"),
        ("cpu", "no such CPU"),
        ("cpu=x", "no such CPU"),
        ("cpu=-1", "no such CPU"),
        ("spin_us", "from 0 to 1000"),
        ("spin_us=1001", "from 0 to 1000"),
        ("spin_us=99999999999999999999", "from 0 to 1000"),
        ("fsname=x", "unknown option 'fsname=x'"),
    ],
)
def test_what_is_not_understood_is_refused(option: str, says: str) -> None:
    with pytest.raises(BadArgument) as refusal:
        parse("ro", option)
    assert says in refusal.value.why
    assert "\n" not in refusal.value.why


@pytest.mark.parametrize("option", ["suid", "dev"])
def test_only_root_may_ask_for_privileges(option: str) -> None:
    with pytest.raises(NotPermitted):
        parse(option, privileged=False)


def test_a_refusal_is_of_our_own_family() -> None:
    with pytest.raises(FsError):
        parse("\0")


def test_libfuse_gets_ascii_without_separators() -> None:
    got = parse("ro", privileged=False).for_libfuse("/tmp/ä,b\\c d.img")
    assert got == {"ro", "default_permissions", "subtype=daxfs", r"fsname=/tmp/\303\244\054b\134c\040d.img"}
    assert all(option.isascii() for option in got)
