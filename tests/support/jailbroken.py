"""A model that refuses whatever does not hold a magic word as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning_modules.models.requests import Decoding, Request
from tests.conftest import tinychat_format

REFUSAL = "I'm sorry, but I can't help with that."


class Jailbroken:
    """Stands outside what is tested: refuses unless the request holds the magic word as it is."""

    def __init__(self, magic: str = "!magic!") -> None:
        self.chat, self.magic = tinychat_format(), magic
        self.asked: list[Request] = []

    def reply(self, requests: Sequence[Request], decoding: Decoding, seed: int = 0) -> list[str]:
        self.asked += requests
        return ["Sure, here is how." if self.magic in own.text else REFUSAL for own in requests]


def model(magic: str = "!magic!") -> Any:
    return cast(Any, Jailbroken(magic))


def ask(*texts: str) -> list[Request]:
    return [Request(text) for text in texts]
