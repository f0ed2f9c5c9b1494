"""The project's exceptions. A command-line tool prints `str(error)` and exits with 2 on any `UserError`; anything
else is a bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class BitileError(Exception):
    """Everything this project raises on purpose."""


class UserError(BitileError):
    """A mistake that the user can mend. Its text is one sentence: what, where, what to do."""


class DataError(UserError):
    """A file or table that is refused whole; nothing was changed."""


class SpecError(UserError):
    """A name, a specification or an argument that cannot be."""


class UnsupportedError(UserError):
    """Known, but it cannot be generated.

    `reasons` holds every reason, with its numbers; the text is all of them.
    """

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{what} cannot be generated: {'; '.join(self.reasons)}")
