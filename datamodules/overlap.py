"""Training rows that are also evaluated on: found by their letters and digits, refused or left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from datamodules.rows import HarmfulRow, Row, RowProblem


@dataclass(frozen=True)
class Overlap:
    """A training row whose prompt is also evaluated on."""

    trained: Row
    evaluated: Row
    subject: str

    @property
    def problem(self) -> RowProblem:
        return RowProblem(
            self.trained.where, f"the prompt is also in evaluation.{self.subject} ({self.evaluated.where})"
        )


def find_overlap(
    training: Sequence[Row], evaluation: Mapping[str, Sequence[Row]], allowed: Sequence[str]
) -> list[Overlap]:
    """Training rows of which a prompt, or the request behind it, letters and digits alone, is also evaluated
    on.

    Args:
        training: all training rows.
        evaluation: the evaluation rows by subject.
        allowed: evaluation sets (`evaluation.harmful`, `.harmless`, `.utility`) whose overlap is accepted.
    """
    evaluated: dict[str, tuple[str, Row]] = {}
    for subject, rows in evaluation.items():
        if f"evaluation.{subject}" not in allowed:
            evaluated |= {normalised(text): (subject, row) for row in rows for text in _evaluated(row)}
    found = []
    for row in training:
        match = next((evaluated[t] for t in map(normalised, _requests(row)) if t in evaluated), None)
        if match is not None:
            found.append(Overlap(row, match[1], match[0]))
    return found


def _evaluated(row: Row) -> Iterator[str]:
    """What no training row may ask: a question about a document is another one about another document, and
    the same one whatever text is hidden there."""
    yield _whole(row)
    if row.data is not None and isinstance(row, HarmfulRow) and row.origin:
        yield row.origin


def _whole(row: Row) -> str:
    return row.prompt if row.data is None else f"{row.prompt}\n{row.data}"


def _requests(row: Row) -> Iterator[str]:
    """Everything that a user asks in a row: training on any of it is training on that request."""
    yield _whole(row)
    if isinstance(row, HarmfulRow):
        yield from [row.origin] if row.origin else []
    else:
        yield from (user for user, _ in row.history)


def normalised(text: str) -> str:
    """A prompt reduced to its letters and digits, for comparing data sets."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def overlap_error(overlaps: Sequence[Overlap]) -> ValueError:
    """The refusal to train on evaluation prompts, naming the set, an example and the remedies."""
    first = overlaps[0]
    name = f"evaluation.{first.subject}"
    return ValueError(
        f"data.{name} overlaps the training data in {len(overlaps)} rows, first "
        f"{first.evaluated.where} = {first.trained.where} "
        f"({first.trained.prompt[:60]!r}); leave such rows out with data.on_overlap: skip, or allow "
        f"the overlap by name with data.allow_overlap: [{name}]"
    )
