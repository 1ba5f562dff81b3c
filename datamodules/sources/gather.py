"""All rows of a field's sources: none missing, no two under one name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from datamodules.rows import Row, RowProblem

T = TypeVar("T")
R = TypeVar("R", bound=Row, covariant=True)


class Source(Protocol[R]):
    """Any source: yields rows of one kind, or problems."""

    def rows(self) -> Iterator[R | RowProblem]: ...


def gather(field: str, sources: Sequence[Source[R]]) -> list[R | RowProblem]:
    """The rows and problems of all sources, in order.

    Args:
        field: the field of the configuration, for messages.
        sources: the field's sources.

    Raises: ValueError for a source without a usable row, or for two rows with one key, naming both places.
    """
    rows = list(stream(field, sources))
    check_keys(field, rows)
    return rows


def stream(field: str, sources: Sequence[Source[R]]) -> Iterator[R | RowProblem]:
    """The same one by one, keys not compared. Raises: ValueError at the end of a source without a usable
    row."""
    for number, source in enumerate(sources):
        usable, bad, first = 0, 0, None
        for row in source.rows():
            if isinstance(row, RowProblem):
                bad, first = bad + 1, first or row
            else:
                usable += 1
            yield row
        if not usable:
            # Even where bad rows are skipped: a wrong column name would leave out the whole source.
            which = f"yields no usable row; {bad} bad, the first: {first}" if bad else "yields no row"
            raise ValueError(
                f"data.{field}.{number}: {describe(source)} {which}; mend the file or the source's "
                "selection, or remove the source"
            )


def check_keys(field: str, rows: Sequence[Row | RowProblem]) -> None:
    """Raises: ValueError for two rows with one key: results of the one would be taken for the other's."""
    places: dict[str, str] = {}
    for row in rows:
        if isinstance(row, RowProblem):
            continue
        if row.key in places:
            raise twin_keys(field, row.key, places[row.key], row.where)
        places[row.key] = row.where


def twin_keys(field: str, key: str, one: str, other: str) -> ValueError:
    return ValueError(
        f"data.{field}: two rows have the key {key!r}: {one} and {other}; give rows ids of their own "
        "(columns: {key: ...}), files of one name folders of different names; a source that shall count "
        "more goes into Repeated, once"
    )


def describe(source: Any) -> str:
    """A source by its class and the file or folder that it reads."""
    inner = getattr(source, "source", None)
    if inner is not None:
        return f"{type(source).__name__} of {describe(inner)}"
    place = next((vars(source)[n] for n in ("path", "behaviors", "run") if n in vars(source)), None)
    return type(source).__name__ + (f" of {place}" if place else "")


def evenly(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` rows, evenly spaced, so that a subset spans a file sorted by category."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]
