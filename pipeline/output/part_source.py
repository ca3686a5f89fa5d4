"""PartSource: deals out the parts that a run generates.

A run pulls the number of its next part when it reads on in its input, up to 256 rows ahead of the
rows that it generates. A local run takes the missing parts in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import part_name
from gptbatch.pipeline.storage.location import Location


class PartSource(Protocol):
    """Deals out part numbers to one run."""

    def next(self) -> int | None:
        """Return the number of the next part to generate; None when there is none now.

        After None, the run writes the parts that it has, and asks again. It ends at a None without
        a part before it. Numbers in ascending order let the run read its input in one pass.
        """

    def committed(self, part: Part) -> None:
        """Take a part that `next` returned and that is written now."""

    def given_up(self, number: int) -> None:
        """Take back a part that `next` returned: the run ends without writing it."""


class LocalParts:
    """The parts of a run that has the job for itself.

    Args:
        numbers: The missing parts, in ascending order.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = iter(numbers)

    def next(self) -> int | None:
        """Return the next missing part."""
        return next(self._numbers, None)

    def committed(self, part: Part) -> None:
        """Do nothing: the file of the part is the record."""

    def given_up(self, number: int) -> None:
        """Do nothing: the next run finds that the part is missing."""


class ListedParts(LocalParts):
    """The parts of a list, except those that are written when their turn comes.

    Args:
        numbers: Numbers of parts, in ascending order.
        folder: The output folder.
    """

    def __init__(self, numbers: Iterable[int], folder: Location) -> None:
        super().__init__(number for number in numbers if not (folder / part_name(number)).exists())
