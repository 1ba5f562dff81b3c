"""What worked in an earlier run: the texts that stood around its requests, read from its rows."""

from __future__ import annotations

from typing import NamedTuple

from datamodules.fields import checked
from datamodules.result_lines import Row
from datamodules.results import ROWS, read_rows
from datamodules.text.chat_format import ChatFormat


class Surroundings(NamedTuple):
    """What an attack put around a request, or around a document where that is what it may write."""

    request: str
    before: str
    after: str


@checked
class StoredSuffixes:
    """Suffixes (and prefixes) of a run's attacked rows, each once; where an attack found one for a request
    again, by other settings or on other weights, the last one in its files, of several processes
    in the order of their numbers.

    The results of an attack that reads them hold for the rows that are there: where the run gets others, it
    attacks again. Of rows in the run that is evaluated itself the folder's name alone counts.

    Args:
        run: the run folder.
        attacks: names of the attacks whose rows count; null for all.
        judge: name (`target_prefix`) or `name@revision` of the judge whose yes counts; null takes failures
            too.
    """

    def __init__(
        self, run: str, attacks: list[str] | None = None, judge: str | None = "target_prefix"
    ) -> None:
        self.run = run
        self.attacks = attacks
        self.judge = judge
        self._found: list[Surroundings] | None = None

    def surroundings(self) -> list[Surroundings]:
        """Raises: ValueError where the run holds no such attack, no verdict of the judge, or nothing that
        worked."""
        if self._found is None:
            # Benign prompts under an attack carry what was found elsewhere, and no verdict of its success.
            rows = [
                row
                for row in read_rows(self.run)
                if row.attack and row.attacked is not None and row.subject == "harmful"
            ]
            unknown = set(self.attacks or ()) - {row.attack for row in rows}
            if not rows or unknown:
                missing = f"no rows of {sorted(unknown)}" if unknown else "no attacked rows"
                raise ValueError(
                    f"StoredSuffixes.run: {missing} in {self.run}/{ROWS}; name a run that attacked with text"
                )
            wanted = (row for row in rows if self.attacks is None or row.attack in self.attacks)
            # An attack that ran again keeps its name: its earlier, perhaps weaker, suffix is not replayed.
            latest = {_sought(row): row for row in wanted if self._worked(row)}
            found = map(_around, latest.values())
            self._found = list(dict.fromkeys(entry for entry in found if entry is not None))
            if not self._found:
                raise ValueError(
                    f"StoredSuffixes.run: no suffix in {self.run}/{ROWS} worked by {self.judge!r}; set judge "
                    "null to take failures too"
                )
        return self._found

    def ids(self, chat: ChatFormat) -> list[list[int]]:
        """The texts as tokens, as a start for searches; those that cannot be typed so are left out there."""
        texts = list(dict.fromkeys(found.after or found.before for found in self.surroundings()))
        return [list(ids) for ids in chat.encode_batch(texts) if ids]

    def _worked(self, row: Row) -> bool:
        return self.judge is None or row.accepted(self.judge, "StoredSuffixes.judge")


def _sought(row: Row) -> tuple[str | int | None, ...]:
    """What a search was for."""
    return row.attack, row.example, row.prompt, row.system, row.document, row.repetition


def _around(row: Row) -> Surroundings | None:
    """None where the request does not stand as it is in what was sent, or nothing was put around it."""
    sent = row.attacked or ""
    # What was attacked: the document where it is in what was sent, which else is the user's text alone.
    document = (row.document or "").strip()
    request = document if document and document in sent else row.prompt.strip()
    before, middle, after = sent.partition(request)
    plain = row.history or row.prefill or not middle or not (before or after)
    return None if plain else Surroundings(request, before, after)
