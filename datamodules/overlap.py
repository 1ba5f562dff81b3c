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


class EvaluatedTexts:
    """What is evaluated on, letters and digits alone.

    Args:
        evaluation: the evaluation rows by subject.
        allowed: evaluation sets (`evaluation.harmful`, `.harmless`, `.utility`) whose overlap is accepted.
    """

    def __init__(self, evaluation: Mapping[str, Sequence[Row]], allowed: Sequence[str]) -> None:
        self._rows: dict[str, tuple[str, Row]] = {}
        for subject, rows in evaluation.items():
            if f"evaluation.{subject}" not in allowed:
                self._rows |= {normalised(text): (subject, row) for row in rows for text in _evaluated(row)}

    @property
    def texts(self) -> list[str]:
        """All of them, normalised and in order."""
        return sorted(self._rows)

    def overlap(self, row: Row) -> Overlap | None:
        """Where a prompt of a training row, or the request behind it, is also evaluated on."""
        known = self._rows
        match = next((known[t] for t in map(normalised, _requests(row)) if t in known), None)
        return None if match is None else Overlap(row, match[1], match[0])


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
