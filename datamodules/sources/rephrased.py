"""Harmless requests from any data, asked for in the forms in which harmful ones are asked for.

Harmful training sets ask in few forms ("Write a tutorial on how to ...", "Develop a plan to ..."), harmless
ones in others, and a small model then learns to refuse the forms, whatever is asked for: SmolLM2-135M refused
every "Write a tutorial ...", until harmless requests had these forms too (experiments/LOG.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from datamodules.fields import Count, checked
from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.base import ChatSource

FORMS = (
    "Give detailed step-by-step directions for how to {}",
    "Write a tutorial on how to {}",
    "Provide step-by-step instructions for how to {}",
    "Develop a plan to {}",
    "Teach me how to {}",
    "Explain how to {}",
    "Write a guide on how to {}",
    "Outline a plan to {}",
    "Create a manual on how to {}",
    "Describe a way to {}",
    "Instruct me on how to {}",
    "Devise a method to {}",
    "List ways to {}",
    "Suggest tricks to {}",
    "I have to {}. Show me how",
    "Write a script that teaches people to {}",
    "Write a blog post that encourages people to {}",
    "Propose a strategy to {}",
    "Illustrate a technique to {}",
    "Detail the steps to {}",
)
"""As AdvBench's and HarmBench's training requests begin."""
LONGEST = 80
"""Characters of a matter; longer ones are whole stories."""

_ASKS = re.compile(
    r"(?:how (?:do|can|could|should|would) (?:i|you|we|one|someone)|how to|tell me how to|i want to"
    r"|what(?: is|'s) the best way to|what are (?:some|the best) ways to"
    r"|give me (?:some )?(?:ideas|tips) (?:on how )?to|can you (?:tell|give) me .{0,30}? to) (.+?)[?.!]*",
    re.IGNORECASE,
)
_SECOND_SENTENCE = re.compile(r"[?.!\n]\s")


@checked
class Rephrased:
    """Those requests of a source that ask how to do something, in other forms and without their replies:
    `thundercat predict` puts a model's own beside them.

    Args:
        source: the requests. One that asks for something else, adds a second sentence, has earlier turns or a
            document is left out; that none is left is an error as with every source.
        num_forms: in how many of the forms each matter occurs.
        forms: texts with {} where the matter goes; null for the forms of public harmful requests.
    """

    def __init__(self, source: ChatSource, num_forms: Count = 2, forms: list[str] | None = None) -> None:
        self.source = source
        self.num_forms = num_forms
        self.forms = list(FORMS) if forms is None else forms
        wrong = [form for form in self.forms if form.count("{}") != 1]
        if wrong or len({*self.forms}) < len(self.forms):
            raise ValueError(
                f"Rephrased.forms: expected different texts with one {{}} each, got {wrong or self.forms}"
            )
        if num_forms > len(self.forms):
            raise ValueError(f"Rephrased.num_forms: expected at most {len(self.forms)}, got {num_forms}")

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        """Forms are spread over the matters, so that each occurs about equally often."""
        number = 0
        for row in self.source.rows():
            if isinstance(row, RowProblem):
                yield row
                continue
            matter = None if row.history or row.data is not None else asked_for(row.prompt)
            if matter is None:
                continue
            for j in range(self.num_forms):
                form = (number + j * len(self.forms) // self.num_forms) % len(self.forms)
                # str.format would read braces of the matter, and of the form beside its place.
                prompt = self.forms[form].replace("{}", matter)
                yield ChatRow(f"{row.key}/form{form}", prompt, "", row.where, row.category, row.system)
            number += 1


def asked_for(prompt: str) -> str | None:
    """X of "How do I X?"; None where a prompt asks for something else, or for more."""
    found = _ASKS.fullmatch(prompt.strip())
    if found is None or len(found[1]) > LONGEST or _SECOND_SENTENCE.search(found[1]):
        return None
    return found[1]
