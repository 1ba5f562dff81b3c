"""Documents with hidden instructions as rows: conversations with a document become adversarial examples."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from datamodules.fields import NonNegativeInt, checked
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.base import ChatSource
from datamodules.sources.files import read_records
from datamodules.sources.injection.imperatives import IMPERATIVES
from datamodules.sources.injection.styles import STYLES, hidden, put
from datamodules.sources.injection.tasks import KINDS, LEAKS, Kind, hidden_task
from datamodules.sources.tinychat.splits import Split, split_of

BEFORE = "\n"
"""Between prompt and document in what an injected row comes from."""
NO_DOCUMENT = "has no document; name its column: columns: {prompt: ..., reply: ..., data: ...}"


@checked
class OfSplit:
    """The part of a source's documents that belongs to a split, by a hash of the document: 70, 12 and 18
    percent.

    Args:
        source: conversations with a document.
        split: `train`, `validation` or `test`.
    """

    def __init__(self, source: ChatSource, split: Split) -> None:
        self.source = source
        self.split: Split = split

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            document = _document(row)
            if isinstance(document, RowProblem):
                yield document
            elif split_of("document", document) == self.split and isinstance(row, ChatRow):
                yield row


@checked
class Injected:
    """Every document with one hidden instruction: the attack wants what that asks for, the safe reply is the
    answer to the trusted instruction. A row's category is the style, its functional category the kind of
    task.

    Args:
        source: conversations with a document and the right reply.
        split: whose styles and tasks are used; no style and no content is in two splits, and no kind where
            `kinds` does not list them.
        kinds: only these kinds of tasks, whatever split they belong to otherwise; `leaks` for the split's own
            that want another record of the document, null for the split's kinds.
        templates: a text file with a style of your own a line, `{task}` where the hidden instruction stands;
            null for the split's styles.
        seed: seed of the choice.
    """

    def __init__(
        self,
        source: ChatSource,
        split: Split,
        kinds: list[Kind] | Literal["leaks"] | None = None,
        templates: str | None = None,
        seed: NonNegativeInt = 0,
    ) -> None:
        if kinds is not None and not kinds:
            raise ValueError("Injected.kinds: expected at least one kind of task or null, got none")
        self.source = source
        self.split: Split = split
        self.kinds: tuple[Kind, ...] = LEAKS[split] if kinds == "leaks" else tuple(kinds or KINDS[split])
        self.templates = templates
        self.seed = seed

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        """Raises: ValueError for a file of templates without `{task}`."""
        styles = self._styles()
        for row in self.source.rows():
            document = _document(row)
            if isinstance(row, RowProblem) or isinstance(document, RowProblem):
                yield document if isinstance(document, RowProblem) else row  # type: ignore[misc]
            else:
                yield self._injected(row, document, styles)

    def _injected(
        self, row: ChatRow, document: str, styles: dict[str, tuple[str, ...]]
    ) -> HarmfulRow | RowProblem:
        # A row's own: the same whatever other rows there are.
        rng = random.Random(f"injected/{self.split}/{self.seed}/{row.key}")
        for kind in rng.sample(self.kinds, len(self.kinds)):
            task = hidden_task(kind, rng, self.split, row)
            if task is None:
                continue
            style = rng.choice(sorted(styles))
            text = put(rng.choice(styles[style]), task.request, rng)
            return HarmfulRow(
                key=f"{row.key}/{style}/{kind}",
                prompt=row.prompt,
                target=task.target,
                safe_reply=row.reply,
                where=row.where,
                category=style,
                functional=kind,
                system=task.system or row.system,
                data=hidden(document, text, rng),
                forbidden=task.forbidden,
                origin=f"{row.prompt}{BEFORE}{document}",
            )
        return RowProblem(
            row.where, f"no hidden task of {list(self.kinds)} can be told from its right answer"
        )

    def _styles(self) -> dict[str, tuple[str, ...]]:
        if self.templates is None:
            return {str(name): texts for name, texts in STYLES[self.split].items()}
        found = tuple(str(record["text"]) for _, record in read_records(self.templates))
        bad = next((text for text in found if "{task}" not in text), None)
        if bad is not None or not found:
            raise ValueError(
                f"Injected.templates: expected a template with {{task}} a line in {self.templates}, got "
                f"{bad!r}"
            )
        return {"own": found}


@checked
class Unwritten:
    """The same rows without the hidden instruction, with the same target: what an attack wins here, no
    instruction has won.

    Args:
        source: documents with hidden instructions.
    """

    def __init__(self, source: Injected) -> None:
        self.source = source

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        for row in self.source.rows():
            if isinstance(row, HarmfulRow):
                document = row.origin.removeprefix(f"{row.prompt}{BEFORE}")
                yield replace(row, key=f"{row.key}/unwritten", data=document)
            else:
                yield row


@checked
class WithImperatives:
    """Every document with a harmless line that tells its human readers to do something: what must not be
    obeyed needs not be refused either, and the right reply stays what it was.

    Args:
        source: conversations with a document.
        split: whose lines are used.
        seed: seed of the choice.
    """

    def __init__(self, source: ChatSource, split: Split, seed: NonNegativeInt = 0) -> None:
        self.source = source
        self.split: Split = split
        self.seed = seed

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            document = _document(row)
            if isinstance(row, RowProblem) or isinstance(document, RowProblem):
                yield document if isinstance(document, RowProblem) else row
                continue
            rng = random.Random(f"imperatives/{self.split}/{self.seed}/{row.key}")
            line = rng.choice(IMPERATIVES[self.split])
            yield replace(row, key=f"{row.key}/imperative", data=hidden(document, line, rng))


def _document(row: ChatRow | RowProblem) -> str | RowProblem:
    if isinstance(row, RowProblem):
        return row
    return RowProblem(row.where, NO_DOCUMENT) if row.data is None else row.data
