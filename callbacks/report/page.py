"""The report page: one HTML file that needs nothing else, from RunResults and drawings."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from callbacks.report.attributions import pictures as attributed
from callbacks.report.cells import Table
from callbacks.report.documents import documents
from callbacks.report.drawing import Drawing, svg
from callbacks.report.escape import printable
from callbacks.report.results import RunResults, SampleRow
from callbacks.report.tables import facts, judges, notes, tables, warnings

EACH = 4
"""Sample rows shown per subject and attack: so many with a true verdict, and so many without."""
LONGEST = 2000
"""Characters of one text after which the page cuts it."""
TITLES = {
    "harmful": "Harmful requests",
    "harmless": "Harmless requests that look harmful",
    "utility": "Benign tasks",
}


@dataclass(frozen=True)
class Sample:
    """One sample, and what the untrained model replied to the same one."""

    row: SampleRow
    before: SampleRow | None


@dataclass(frozen=True)
class Samples:
    """What is shown of one subject under one attack."""

    title: str
    folded: bool
    shown: Sequence[Sample]
    total: int


def page(results: RunResults, figures: Mapping[str, Drawing]) -> str:
    """The page's HTML."""
    return rendered(
        "page.html.jinja",
        name=results.folder.name,
        stage=results.stage,
        facts=facts(results),
        warnings=warnings(results),
        tables=tables(results),
        notes=notes(results),
        judges=judges(results),
        figures=pictures(figures),
        attacks=list(results.after.attacks.values()) if results.after is not None else [],
        documents=documents(results),
        samples=samples(results),
        attributed=attributed(results),
        configuration=_whole(
            yaml.safe_dump(dict(results.configuration), sort_keys=False, allow_unicode=True)
        ),
    )


def study_page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, Drawing],
    links: Mapping[str, str] | None = None,
) -> str:
    """The HTML of several runs side by side: notes, tables that can be sorted and narrowed by words, figures,
    and links (text -> path relative to the page)."""
    return rendered(
        "study.html.jinja",
        scripts=["study.js"],
        title=title,
        notes=notes,
        tables=tables,
        figures=pictures(figures),
        links=links or {},
    )


def rendered(template: str, scripts: Sequence[str] = (), styles: Sequence[str] = (), **values: Any) -> str:
    """A page of the template folder.

    Args:
        template: its name.
        scripts: files of the template folder after the page's own script.
        styles: files after its own style.
        values: what the template shows; all texts are escaped.
    """
    script = "".join(map(_file, ("page.js", *scripts)))
    return (
        _environment()
        .get_template(template)
        .render(
            **values,
            style=Markup("".join(map(_file, ("page.css", *styles)))),
            script=Markup(script),
            # Only this script runs, and nothing is loaded: not even markup that got past the escaping could.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def pictures(figures: Mapping[str, Drawing]) -> list[tuple[Drawing, Markup]]:
    """Drawings with their SVG."""
    return [(drawing, Markup(svg(drawing, stem))) for stem, drawing in figures.items()]


def samples(results: RunResults) -> list[Samples]:
    """Samples of the latest snapshot by subject and attack, successes and failures alike, in their order."""
    if results.after is None:
        return []
    earlier: dict[tuple[str, str, str, bool], SampleRow] = {}
    if results.before is not None and results.before is not results.after:
        earlier = {_identity(row): row for row in results.before.samples}
    kinds: dict[tuple[str, str, bool], list[SampleRow]] = {}
    for row in results.after.samples:
        kinds.setdefault((row.subject, row.attack, row.base_reply is not None), []).append(row)
    return [
        Samples(
            TITLES.get(subject, subject)
            + (f": {attack.replace('_', ' ')}" if attack else "")
            + (": against the base model" if against_base else ""),
            subject == "harmful",
            [Sample(row, earlier.get(_identity(row))) for row in _chosen(rows)],
            len(rows),
        )
        for (subject, attack, against_base), rows in kinds.items()
    ]


def _chosen(rows: Sequence[SampleRow]) -> list[SampleRow]:
    true = [row for row in rows if _stands_out(row)][:EACH]
    false = [row for row in rows if not _stands_out(row)][:EACH]
    return [*true, *false]


def _stands_out(row: SampleRow) -> bool:
    """A judge said yes; of a reply beside the base model's: it is another one."""
    return any(row.verdicts.values()) if row.base_reply is None else row.reply != row.base_reply


def _identity(row: SampleRow) -> tuple[str, str, str, bool]:
    return row.subject, row.attack, row.key, row.base_reply is not None


def _shown(value: Any) -> str:
    """Every text of the page comes through here before jinja escapes its HTML."""
    text = printable(str(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST} characters more)"


def _whole(text: str) -> Markup:
    return escape(printable(text))


def _file(name: str) -> str:
    return (resources.files(__package__) / "template" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("callbacks.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A value that is already markup (a drawing, our own script) is left as it is.
        finalize=lambda value: value if isinstance(value, Markup) else _shown(value),
    )
