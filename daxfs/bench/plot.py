"""A result as a picture."""

from daxfs.bench.result import Result


def svg(result: Result) -> str:
    raise NotImplementedError
