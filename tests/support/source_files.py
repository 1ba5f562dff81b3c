"""Files that sources read, written for a test, and what an evaluation makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.rows import RowProblem
from datamodules.text.encoding import EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig

TINYCHAT = TokenizerConfig("tinychat:base")


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    """A conversation of (role, text) as files hold it."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CONVERSATION = messages(
    ("system", "You are helpful."),
    ("user", "What is 1 plus 1?"),
    ("assistant", "The sum is 2."),
    ("user", "And 2 plus 2?"),
    ("assistant", "The sum is 4."),
)


def write(path: Path, content: Any) -> str:
    """Bytes or text as they are, anything else as JSON; returns the path as a source takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def evaluated(harmless: list[Any], **encoding: Any) -> EvaluationData:
    """These sources, read as an evaluation reads its harmless rows."""
    data = EvaluationData(TINYCHAT, EvaluationSets(harmless=harmless), EncodingConfig(160, **encoding))
    data.setup("test")
    return data


def problems(source: Any) -> list[str]:
    """What a source says of its bad rows."""
    return [str(row) for row in source.rows() if isinstance(row, RowProblem)]
