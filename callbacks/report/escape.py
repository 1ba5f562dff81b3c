"""Text that models, users and files wrote, made safe to show: nothing in it acts on a terminal or a report.

A reply may hold terminal sequences (ESC can retitle a window or erase lines), a bidirectional override that
shows a name backwards, or a lone surrogate that no file can be written with. All become visible escapes.
HTML needs nothing more than this and jinja's autoescape.
"""

from __future__ import annotations

import re
import unicodedata

JOINERS = "\u200c\u200d"
"""Invisible, but words of some scripts and composed emoji are wrong without them."""
HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
SPECIAL = re.compile(r"[\\`*|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])")
"""What Markdown (GitHub's, with its mathematics) would take for markup in the middle of a line."""


def printable(text: str, one_line: bool = False) -> str:
    r"""`text` with every control, format and surrogate character as an escape (`\x1b`, `\u202e`, `\ud800`).

    Newlines and tabs stay, unless `one_line` is set: a carriage return never does, it would overwrite a line.
    """
    # Pages of many runs print texts by the million, nearly all of them plain.
    if (text if one_line else text.replace("\n", "").replace("\t", "")).isprintable():
        return text
    kept = JOINERS if one_line else JOINERS + "\n\t"
    return "".join(char if char in kept or _visible(char) else _escape(char) for char in text)


def markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it literally, also within a table's cell."""
    text = SPECIAL.sub(r"\\\g<0>", printable(text, one_line=True))
    return text.translate(HTML)


def _visible(char: str) -> bool:
    # Zl and Zp end a line in some programs.
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(char: str) -> str:
    # Not `unicode_escape` of the whole text: that would escape every letter beyond ASCII.
    return char.encode("unicode_escape").decode("ascii")
