"""Coverage-guided fuzzing of mount and fsck, with atheris: libFuzzer over instrumented Python. `make fuzz` runs it.

libFuzzer does not see an image, whose checksums it would spend its time on: it sees a recipe, a few bytes for each change of
a field of a record, which is sealed again (fuzz_image.py). What runs is fuzz_use.ordeal; Harm ends the run with exit code 77
and leaves the recipe in --keep, for `--recipe FILE` to do it again.

A program of its own: atheris instruments what is imported after it. daxfs and its tests do not need it: pip install
'daxfs[fuzz]'.
"""

from __future__ import annotations

import argparse
import importlib
import os
import struct
import sys
from pathlib import Path
from typing import Any

CHANGES_MAX = 32
RECIPE_BYTES_MAX = 256
_INSTRUMENTED = ["daxfs.core", "daxfs.errors"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_coverage", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="directory: recipes to begin with, and those that were of use")
    parser.add_argument("--keep", type=Path, default=Path(), help="directory for the recipe that did harm")
    parser.add_argument("--recipe", type=Path, help="only this one")
    arguments = parser.parse_args()
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("atheris is missing; install it: pip install 'daxfs[fuzz]'", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=_INSTRUMENTED):
        fuzz: Any = importlib.import_module("tools.fuzz")
        use: Any = importlib.import_module("tools.fuzz_use")
    seeds = [fuzz.seed_image(state) for state in fuzz.STATES]
    image = Path(f"/proc/self/fd/{os.memfd_create('image')}")  # libFuzzer ends the process without tidying up

    def try_recipe(data: bytes) -> None:
        image.write_bytes(cook(atheris.FuzzedDataProvider(data), seeds))
        use.ordeal(image)

    arguments.keep.mkdir(parents=True, exist_ok=True)
    words = [sys.argv[0], f"-seed={arguments.seed}", f"-max_len={RECIPE_BYTES_MAX}", "-len_control=0", "-timeout=120",
             "-rss_limit_mb=3000", f"-artifact_prefix={arguments.keep}/"]  # fmt: skip
    if arguments.recipe:
        words.append(str(arguments.recipe))
    else:
        words.append(f"-max_total_time={arguments.seconds}")
        if arguments.corpus:
            arguments.corpus.mkdir(parents=True, exist_ok=True)
            words.append(str(arguments.corpus))
    atheris.Setup(words, try_recipe)
    atheris.Fuzz()
    return 0


def cook(recipe: Any, seeds: list[Any]) -> bytes:
    """The image that a recipe makes: of which state, then field after field."""
    seed = seeds[recipe.ConsumeIntInRange(0, len(seeds) - 1)]
    image = bytearray(seed.data)
    for _ in range(CHANGES_MAX):
        if not recipe.remaining_bytes():
            break
        target = seed.targets[recipe.ConsumeIntInRange(0, len(seed.targets) - 1)]
        _, at, code = target.fields[recipe.ConsumeIntInRange(0, len(target.fields) - 1)]
        how = recipe.ConsumeIntInRange(0, 15)
        if how < 8:
            value = seed.numbers[recipe.ConsumeIntInRange(0, len(seed.numbers) - 1)]
        else:
            value = recipe.ConsumeUInt(8 if how < 12 else 1 if how < 14 else 2)
        struct.pack_into("<" + code, image, at, value & (1 << 8 * struct.calcsize(code)) - 1)
        if how != 15:
            target.seal(image)
    return bytes(image)


if __name__ == "__main__":
    sys.exit(main())
