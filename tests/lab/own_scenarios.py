"""What a person writes who has a case of his own: one that takes the common course, one that is a story."""

from __future__ import annotations

from daxfs.lab import Lab, breaks, case, punch, story

case("own-case", "three pins, one hole", source="mine", pins=[(0, 2), (3, 2), (6, 2)], call=punch(1, 6), sees=breaks(busy=4))


@story("own-story", "a story with another end", source="mine", pins="P: A[0,1)", call="look(A)", sees={"busy": "cheese"})
def own_story(lab: Lab) -> None:
    path = lab.file()
    lab.holder(path).pin()
    length = lab.process().do(look, path)
    lab.equal(length, 8 * 4096, "size")
    lab.see(False, "the moon is not made of cheese")


def look(path: str) -> int:
    """Runs in another process."""
    with open(path, "rb") as file:
        return len(file.read())
