"""The profile of a request, from samples as `perf script` prints them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tools.request_profile import Frame, flame, known, part, stacks, table

SCRIPT = """\
        ffffffff81234567 fuse_copy_do+0x20 ([kernel.kallsyms])
        ffffffff81234567 fuse_dev_do_write+0x20 ([kernel.kallsyms])
        ffffffff81234568 do_writev+0x10 ([kernel.kallsyms])
            7f0000000001 writev+0x40 (/usr/lib/libc.so.6)

        ffffffff81234567 try_to_wake_up+0x20 ([kernel.kallsyms])
        ffffffff81234567 fuse_dev_do_write+0x20 ([kernel.kallsyms])

            7f0000000001 dx_hot_read+0x40 (/x/daxfs/daemon/session.cpython-311-x86_64-linux-gnu.so)
            7f0000000009 nonsense (/usr/lib/libc.so.6)

            5500000000aa _PyEval_EvalFrameDefault+0x40 (/usr/bin/python3.11)

            7f0000000001 [unknown] ([vdso])

            7f0000000001 __memmove_avx (/usr/lib/libc.so.6)
"""


def test_samples_are_parted_by_what_their_stacks_name() -> None:
    samples = list(stacks(SCRIPT))
    assert [part(stack) for stack in samples] == [
        "kernel: the answer: write(/dev/fuse)",
        "kernel: waking the caller",
        "the hot path, in C",
        "Python",
        "clock",
        "copying and flushing data",
    ]
    assert known(samples[0])[-1] == Frame("do_writev", "[kernel.kallsyms]")  # what user code called it is not known
    assert known(samples[2]) == samples[2][:1]
    rows = table(samples, 6.0)
    assert sum(us for _, us, _ in rows) == pytest.approx(6.0)
    assert {name: us for name, us, _ in rows}["Python"] == pytest.approx(1.0)
    assert part((Frame("read", "/usr/lib/libc.so.6"),)) == "libc and others"
    assert list(stacks("")) == []


def test_the_flame_graph_is_well_formed_and_as_wide_as_its_samples() -> None:
    root = ElementTree.fromstring(flame(list(stacks(SCRIPT)), "some <title>"))
    boxes = {}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        title, box = group[0].text, group[1].attrib
        assert title
        boxes[title.partition(",")[0]] = (float(box["x"]), float(box["y"]), float(box["width"]))
    assert boxes["the daemon"][2] == pytest.approx(1000, abs=1)
    answer, copy = boxes["fuse_dev_do_write"], boxes["fuse_copy_do"]
    assert copy[1] < answer[1] < boxes["the daemon"][1]  # what is called is above
    assert copy[2] == pytest.approx(1000 / 6, abs=1)
