"""Untrusted data inside a user's turn: a retrieved document or a tool's output between marks of its own.

    instruction <before> document <after>

What stands between the marks may have been written by anybody, so it must not be able to end its part: marks
and the template's special tokens in it are broken up or refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from datamodules.fields import checked


@checked
@dataclass(frozen=True)
class DataMarks:
    """What stands around a document, and what happens to a document that holds it.

    The marks may be a template's own: `before: "<|im_end|>\\n<|im_start|>tool\\n", after: ""` gives the
    document a turn of its own in SmolLM2's template.
    """

    before: str = "\n\n[data]\n"
    """Between instruction and document."""
    after: str = "\n[/data]"
    """After the document; '' where the template ends it."""
    on_mark: Literal["escape", "refuse"] = "escape"
    """A mark or a special token inside a document is broken up by a space (`escape`), or the row is bad
    (`refuse`)."""

    def __post_init__(self) -> None:
        for name, mark in (("before", self.before), ("after", self.after)):
            if len(mark.strip()) < 2 and (mark or name == "before"):
                raise ValueError(
                    f"DataMarks.{name}: expected a mark of at least two characters that are no space, got "
                    f"{mark!r}"
                )

    def within(self, text: str) -> str | None:
        """The first mark in a text, case aside; None where there is none."""
        found = self._pattern.search(text)
        return None if found is None else found.group()

    def broken(self, text: str) -> str:
        """The text with every mark broken up by a space after its first character."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda mark: f"{mark.group()[0]} {mark.group()[1:]}", text)
        return text

    @property
    def _pattern(self) -> re.Pattern[str]:
        marks = {mark.strip() for mark in (self.before, self.after) if mark.strip()}
        own = sorted(map(re.escape, marks), key=len, reverse=True)
        return re.compile("|".join(own), re.IGNORECASE)
