"""A model of the wait that Linux could not have, and of the one that daxfs has (Kara, October 2017).

Two threads, and a lock that keeps page faults out of a hole while it is being punched:
    GUP     refers to page A, then faults on page B for the second part of its range, does its I/O, lets go
    punch   frees pages A and B: takes the lock, waits for their references, frees, drops the lock
`naive` waits under the lock; `daxfs` looks under the lock, drops it to wait, and looks again. All interleavings are tried: a
state in which nobody can go on and somebody has not ended is a deadlock. `freed under a reference` would be the 2017 bug.

A model, no mount: the scenario `wait-holder-pins-again` plays the same on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

START, END = "start", "end"


@dataclass(frozen=True)
class State:
    """`at`: where each thread is; `lock`: who has it; `references`: pages that GUP refers to; `freed`: pages that are
    gone."""

    gup: str = START
    punch: str = START
    lock: str = ""
    references: frozenset[str] = frozenset()
    freed: frozenset[str] = frozenset()


Step = Callable[[State], tuple[str, State] | None]  # what it does and the state after; None: it has to wait


def gup(state: State) -> tuple[str, State] | None:
    """get_user_pages over A and B; a fault needs the lock for a moment. Of a freed page there is nothing to get: EFAULT."""
    for page, before, after in (("A", START, "has A"), ("B", "has A", "has both")):
        if state.gup == before:
            if state.lock:
                return None
            if page in state.freed:
                return f"GUP faults on page {page}, which is gone: EFAULT, lets go", replace(
                    state, gup=END, references=frozenset()
                )
            return f"GUP faults on page {page} and refers to it", replace(
                state, gup=after, references=state.references | {page}
            )
    if state.gup == "has both":
        return "GUP does its I/O and lets go", replace(state, gup=END, references=frozenset())
    return None


def naive_punch(state: State) -> tuple[str, State] | None:
    """Waits for the references with the lock in hand."""
    if state.punch == START:
        return None if state.lock else ("punch takes the lock", replace(state, punch="locked", lock="punch"))
    if state.punch == "locked":
        return None if state.references else _free(state)
    return None


def daxfs_punch(state: State) -> tuple[str, State] | None:
    """Looks and frees in one step; if there are references, nothing is held while it waits for them to go."""
    if state.punch == START:
        if state.references:
            return "punch finds references and waits, holding nothing", replace(state, punch="waits")
        return _free(state)
    if state.punch == "waits":
        return None if state.references else ("punch wakes and looks again", replace(state, punch=START))
    return None


def _free(state: State) -> tuple[str, State]:
    return "punch frees A and B", replace(state, punch=END, lock="", freed=frozenset("AB"))


DESIGNS: Mapping[str, Step] = {"naive": naive_punch, "daxfs": daxfs_punch}


def explore(punch: Step) -> tuple[int, list[str] | None]:
    """Try all interleavings. How many states there are, and the steps of the shortest way into a deadlock, if there is
    one."""
    first = State()
    ways: dict[State, list[str]] = {first: []}
    todo = [first]
    for state in todo:
        moves = [move for step in (gup, punch) if (move := step(state)) is not None]
        if not moves and not state.gup == state.punch == END:
            return len(ways), ways[state]
        for what, after in moves:
            if after.references & after.freed:
                raise AssertionError(f"freed under a reference: {[*ways[state], what]}")
            if after not in ways:
                ways[after] = [*ways[state], what]
                todo.append(after)
    return len(ways), None
