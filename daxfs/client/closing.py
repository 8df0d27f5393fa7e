"""Things with a `close`, as context managers."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    def close(self) -> object:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
