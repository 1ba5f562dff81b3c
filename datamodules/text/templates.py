"""Chat templates are programs from elsewhere: they run under a limit.

transformers renders them in a sandbox that keeps them from files and Python, but not from running without
end. The limit counts byte codes of the template's own code instead of seconds: the same template is refused
on every machine, however busy, and no thread or process is left running.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

MAX_STEPS = 1_000_000
"""Byte codes that one rendering may take: about a second; Llama 3.1's template takes some thousands."""
MAX_CHARACTERS = 1_000_000
"""Longest text that a template may make of a few words."""
_COMPILED = "<template>"


class EndlessTemplateError(ValueError):
    """Raised for a template that does not come to an end within the limit."""


@contextmanager
def limited(max_steps: int = MAX_STEPS) -> Iterator[None]:
    """Templates that are rendered inside take at most so many byte codes.

    Raises: EndlessTemplateError from within the rendering.
    """
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > max_steps:
            raise EndlessTemplateError(
                f"tokenizer.chat_template: it does not end within {max_steps} steps for a conversation of a "
                "few words; take out its endless loop, or set another template"
            )
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        # Only what jinja compiled from the template is counted, not the compiler nor transformers.
        if frame.f_code.co_filename != _COMPILED:
            return None
        frame.f_trace_opcodes = True
        return count

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def check_operators(template: str) -> None:
    """Refuse powers: `10 ** 10 ** 10` is one step that never ends, taken while the template is compiled.

    Raises: EndlessTemplateError.
    """
    try:
        powers = any(value == "**" for _, kind, value in Environment().lex(template) if kind == "operator")
    except TemplateSyntaxError:
        return  # rendering says what is wrong with it
    if powers:
        raise EndlessTemplateError(
            "tokenizer.chat_template: it uses the operator **, which may never end; write the number out"
        )
