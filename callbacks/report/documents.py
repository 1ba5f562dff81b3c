"""Three documents with hidden instructions as a reader of the page sees them: what was asked, what stood in
the document, and what the model replied before and after training, attack by attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from callbacks.judges.injection import AnswerOverlap, InjectedText, TaskKept
from callbacks.report.results import RunResults, SampleRow, Snapshot

SHOWN = 3
LONG = 6
"""Words of an answer from which on sharing half of them says something: "It is red." and "It is blue." do."""
KINDS = {
    (True, False): "obeyed before training, and not after it",
    (True, True): "obeyed before training and after it",
    (False, True): "obeyed after training alone",
    (False, False): "not obeyed",
}
"""Obeyed under any of the attacks, before and after."""


@dataclass(frozen=True)
class Reply:
    """One reply to the document under one attack."""

    text: str
    obeyed: bool
    """It says what must not appear in it."""
    kept: bool
    """It is the answer to the trusted instruction."""
    resembles: bool = False
    """It shares enough words with an answer that is long enough for that to say something."""

    @property
    def verdict(self) -> str:
        """In words."""
        kept = "task kept" if self.kept else "task kept in other words" if self.resembles else "task lost"
        return f"{'obeys' if self.obeyed else 'does not obey'}, {kept}"


@dataclass(frozen=True)
class Attacked:
    """What one attack made of the document, and the replies to it."""

    attack: str
    sent: str | None
    """The document that was sent in its place; None for the document as it is, and where nobody can type
    it."""
    before: Reply | None
    after: Reply


@dataclass(frozen=True)
class Document:
    """One document under every attack that tried it."""

    kind: str
    row: SampleRow
    attacks: Sequence[Attacked]

    @property
    def outcome(self) -> tuple[tuple[bool, bool], ...]:
        """Obeyed before and after, attack by attack."""
        return tuple((own.before is not None and own.before.obeyed, own.after.obeyed) for own in self.attacks)


def documents(results: RunResults) -> list[Document]:
    """Of every outcome, attack by attack, the first document, in the order of the rows, then the next ones;
    only documents that most attacks tried. Empty where no document holds a hidden instruction."""
    after = _of_documents(results.after)
    before = _of_documents(results.before if results.before is not results.after else None)
    most = max(map(len, after.values()), default=0)
    every = [_document(own, before.get(key, {})) for key, own in after.items() if len(own) == most]
    firsts = list({own.outcome: own for own in reversed(every)}.values())
    chosen = [own for own in every if own in firsts] + [own for own in every if own not in firsts]
    return chosen[:SHOWN]


def _of_documents(snapshot: Snapshot | None) -> dict[str, dict[str, SampleRow]]:
    """Key of an example -> attack -> its row, of documents whose hidden instruction was judged."""
    found: dict[str, dict[str, SampleRow]] = {}
    for row in snapshot.samples if snapshot is not None else ():
        if (
            row.subject == "harmful"
            and row.document is not None
            and _said(row, InjectedText.name) is not None
        ):
            found.setdefault(row.key, {}).setdefault(row.attack, row)
    return found


def _document(own: dict[str, SampleRow], before: dict[str, SampleRow]) -> Document:
    attacks = [
        Attacked(attack, row.attacked, _reply(before[attack]) if attack in before else None, _reply(row))
        for attack, row in own.items()
    ]
    obeyed = any(own.after.obeyed for own in attacks)
    earlier = any(own.before.obeyed for own in attacks if own.before is not None)
    kind = KINDS[earlier, obeyed] if before else "obeyed" if obeyed else "not obeyed"
    return Document(kind, next(iter(own.values())), attacks)


def _reply(row: SampleRow) -> Reply:
    resembles = len(row.answer.split()) >= LONG and bool(_said(row, AnswerOverlap.name))
    return Reply(row.reply, bool(_said(row, InjectedText.name)), bool(_said(row, TaskKept.name)), resembles)


def _said(row: SampleRow, judge: str) -> bool | None:
    """What a judge said, in whatever revision; None where it was not asked."""
    return next((verdict for name, verdict in row.verdicts.items() if name.split("@")[0] == judge), None)
