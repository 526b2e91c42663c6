"""What forms have in common whose calls all begin with the same marker, and are read by marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..tools import Tool
from .argument_pairs import parameters_by_name
from .marked_reader import MarkedReader, Marks
from .pair_reader import PairMarks, PairReader
from .pieces import Reader


class MarkedForm:
    """A form whose calls have their arguments as an object.

    Attributes:
        marks: of its calls.
    """

    marks: ClassVar[Marks]

    def beginnings(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """Its marker."""
        del tools
        return self.marks.openings

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """Whatever the markers enclose is a call, if it has a name and arguments."""
        del tools
        return MarkedReader(self.marks)


class PairForm:
    """A form whose calls have their arguments one by one.

    Attributes:
        marks: of its calls.
    """

    marks: ClassVar[PairMarks]

    def beginnings(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """Its marker."""
        del tools
        return (self.marks.opening,)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """Whatever the markers enclose is a call, if it has a name."""
        return PairReader(self.marks, parameters_by_name(tools))
