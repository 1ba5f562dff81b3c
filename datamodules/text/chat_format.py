"""Chat template -> prompt ids with a role per token, and reply ids that continue exactly that prompt.

The prompt is tokenised once; a reply is tokenised in its context and split off by character position, never
by searching for a response key. Where the tokenizer would merge across the border between prompt and reply,
the reply is tokenised on its own (that is what a model must generate after the prompt), and the round trip
through decode is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product

from transformers import PreTrainedTokenizerBase

from datamodules.rows import Turn as Turn
from datamodules.text.data_part import DataMarks
from datamodules.text.spans import Attackable as Attackable
from datamodules.text.spans import PromptTokens as PromptTokens
from datamodules.text.spans import Role as Role
from datamodules.text.spans import Span, divided, fill, placeholder, role_of, stripped
from datamodules.text.templates import MAX_CHARACTERS, EndlessTemplateError, check_operators, limited

_USER, _SYSTEM, _REPLY = "QusertextQ", "QsystemtextQ", "QreplytextQ"
_NAMES = {
    Role.USER: "the user's text",
    Role.SYSTEM: "the system message",
    Role.HISTORY: "an earlier turn",
    Role.DATA: "the document",
}


class ChatFormat:
    """Formats chats with a tokenizer's own template.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        marks: what stands around a document.

    Raises: ValueError if the template does not show the user's text, no end of turn follows a reply, or the
        template does not come to an end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: DataMarks | None = None) -> None:
        self.tokenizer = tokenizer
        self.marks = marks or DataMarks()
        self._backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._special = sorted(
            set(tokenizer.all_special_tokens) | _added_special(tokenizer), key=len, reverse=True
        )
        self._special_ids = {tokenizer.convert_tokens_to_ids(token) for token in self._special}
        self._any_special = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._skeletons: dict[tuple[int, bool], str] = {}
        self._before_reply, self._after_reply = self._reply_frame()
        self._strips_reply = f" {_REPLY} " not in self._render(_USER, None, f" {_REPLY} ")

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which a generated reply ends: the template's end of turn, then the tokenizer's end of
        sequence."""
        ids = self._encode(self._after_reply)[-1:] if self._after_reply.endswith(tuple(self._special)) else []
        eos = self.tokenizer.eos_token_id
        return [*ids, *([eos] if eos is not None and eos not in ids else [])]

    @property
    def end_of_turn(self) -> list[int]:
        """Ids that follow a reply's text; a reply ends with them unless the tokenizer merges across the
        border."""
        return self._encode(self._after_reply)

    def prompt(
        self,
        user: str,
        system: str | None = None,
        history: Sequence[Turn] = (),
        data: str | None = None,
    ) -> PromptTokens:
        """Tokenise a prompt, after earlier turns if there are any, up to where the assistant's reply starts.

        Args:
            data: a document that belongs to the user's text; it stands behind it, between the marks.

        Raises: ValueError if the template rewrites the text, or if any text contains one of its special
            tokens (a document's are broken up or refused, as the marks say).
        """
        document, user_length = None, len(user)
        if data is not None:
            document, user = self.as_data(data), user.strip()
            user_length = len(user)
            user = self._with_data(user, document)
        shapes = [(len(history), True)] if system is not None else []
        # Some templates leave an empty system message out, so the shape without one may fit too.
        skeletons = [self._skeleton(*shape) for shape in [*shapes, (len(history), False)]]
        text = self._render(user, system, None, history)
        spans = self._spans(text, user, system, history, skeletons)
        data_span = None
        if document is not None:
            spans, data_span = divided(spans, user_length, len(self.marks.before), len(document))
        encoding = self._backend.encode(text, add_special_tokens=False)
        roles = [role_of(start, end, spans) for start, end in encoding.offsets]
        for i, (token, (start, _)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token not in self._special_ids or roles[i] is Role.TEMPLATE:
                continue
            if role_of(start, start, spans) is not Role.TEMPLATE:
                raise self._control_token(_NAMES[roles[i]], self.tokenizer.convert_ids_to_tokens(token))
            # A special token that swallows the white space after it (Phi-3's do) is the template's.
            roles[i] = Role.TEMPLATE
        user_span = next(((start, end) for start, end, role in spans if role is Role.USER))
        return PromptTokens(
            list(encoding.ids),
            roles,
            text,
            system,
            user_span,
            list(encoding.offsets),
            tuple(self._reply_spans(text, spans)),
            document,
            data_span,
        )

    def as_data(self, text: str) -> str:
        """A document as it may stand between the marks: nothing in it ends its part or its turn.

        Raises: ValueError for an empty document, and under `on_mark: refuse` for one that would have to be
            changed.
        """
        text = text.strip()
        if not text:
            raise ValueError("the document is empty")
        if self.marks.on_mark == "refuse":
            control = self._any_special.search(text)
            if control is not None:
                raise self._control_token("the document", control.group())
            mark = self.marks.within(text)
            if mark is not None:
                raise ValueError(
                    f"the document contains the mark {mark!r}; remove it there, set other data_marks, or "
                    "data_marks.on_mark: escape"
                )
        return self.marks.broken(self.neutralised(text))

    def _with_data(self, user: str, document: str) -> str:
        mark = self.marks.within(user)
        if mark is not None:
            raise ValueError(f"the user's text contains the mark of a document {mark!r}; remove it there")
        return f"{user}{self.marks.before}{document}{self.marks.after}"

    def reply(self, prompt: PromptTokens, reply: str) -> list[int]:
        """Ids of a reply, end of turn included, as they continue `prompt.ids`.

        Raises: ValueError for an empty reply, one with a special token of the template, or one that does not
            survive the round trip.
        """
        reply = reply.strip() if self._strips_reply else reply
        if not reply.strip():
            raise ValueError("the reply is empty")
        control = self._any_special.search(reply)
        if control is not None:
            raise self._control_token("the reply", control.group())
        continuation = self._before_reply + reply + self._after_reply
        joint = self._encode(prompt.text + continuation)
        if joint[: len(prompt.ids)] == prompt.ids:
            return joint[len(prompt.ids) :]
        wanted = self._decode(joint)
        for candidate in (
            self._encode(continuation),
            self._encode(continuation.lstrip()),
            self._encode_inside(continuation),
        ):
            if self._decode(prompt.ids + candidate) == wanted:
                return candidate
        raise ValueError(
            f"the tokenizer cannot continue the prompt with {reply[:40]!r}: decoding changes the text"
        )

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids without special tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def decode_batch(self, rows: list[list[int]]) -> list[str]:
        """Texts of token lists, special tokens included."""
        return list(self._backend.decode_batch(rows, skip_special_tokens=False))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered prompts, as `prompt` tokenises them."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def neutralised(self, text: str) -> str:
        """The text with every special token of the template broken by a space, so that it cannot end a turn
        or start one."""
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _render(
        self,
        user: str,
        system: str | None,
        reply: str | None,
        history: Sequence[Turn] = (),
        probe: bool = False,
    ) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for earlier_user, earlier_reply in history:
            messages += [
                {"role": "user", "content": earlier_user},
                {"role": "assistant", "content": earlier_reply},
            ]
        messages.append({"role": "user", "content": user})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        try:
            with limited() if probe else nullcontext():
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=reply is None
                )
        except EndlessTemplateError:
            raise
        except Exception as error:  # the template language raises its own types
            hint = (
                "; this template may take no system message: set system: null" if system is not None else ""
            )
            raise ValueError(f"the chat template failed: {error}{hint}") from error
        if probe and len(text) > MAX_CHARACTERS:
            raise ValueError(f"tokenizer.chat_template: it makes {len(text)} characters of a few words")
        return str(text)

    def _reply_frame(self) -> tuple[str, str]:
        """What stands between prompt and reply, and from the reply to its end of turn."""
        check_operators(str(self.tokenizer.chat_template))
        prompt, full = self._skeleton(0, False), self._render(_USER, None, _REPLY, probe=True)
        if not full.startswith(prompt) or _REPLY not in full or _USER not in prompt:
            raise ValueError(
                f"expected a chat template whose conversation starts with its own prompt, got {prompt!r} and "
                f"{full!r}; set tokenizer.chat_template"
            )
        before, _, after = full[len(prompt) :].partition(_REPLY)
        ends = [after.index(token) + len(token) for token in self._special if token in after]
        if not after.strip():
            raise ValueError(
                f"expected an end of turn after a reply, got {after!r}; end assistant turns with a "
                "token in tokenizer.chat_template"
            )
        return before, after[: min(ends)] if ends else after

    def _skeleton(self, turns: int, with_system: bool) -> str:
        """A prompt of this shape with a placeholder for every text, rendered once under the limits.

        Every shape is rendered here before real texts are, so that a template without end stops at once.
        """
        shape = turns, with_system
        if shape not in self._skeletons:
            history = [(placeholder(i, "user"), placeholder(i, "reply")) for i in range(turns)]
            system = _SYSTEM if with_system else None
            self._skeletons[shape] = self._render(_USER, system, None, history, probe=True)
        return self._skeletons[shape]

    def _spans(
        self, text: str, user: str, system: str | None, history: Sequence[Turn], skeletons: Sequence[str]
    ) -> list[Span]:
        """Character spans of all texts in a rendered prompt, told by skeletons of the same shape.

        Templates differ in whose texts they strip of white space.
        """
        for skeleton, strip_asked, strip_replied in product(skeletons, (False, True), (False, True)):
            asked = {_USER: (user, Role.USER), _SYSTEM: (system or "", Role.SYSTEM)}
            asked |= {placeholder(i, "user"): (turn[0], Role.HISTORY) for i, turn in enumerate(history)}
            replied = {placeholder(i, "reply"): (turn[1], Role.HISTORY) for i, turn in enumerate(history)}
            built, spans = fill(skeleton, stripped(asked, strip_asked) | stripped(replied, strip_replied))
            if built == text:
                return spans
        raise ValueError(
            "the chat template rewrites the text it is given, so the user's tokens cannot be told apart"
        )

    def _reply_spans(self, text: str, spans: list[Span]) -> Iterator[tuple[int, int]]:
        """The earlier replies with the end of turn that follows each."""
        turns = [(start, end) for start, end, role in spans if role is Role.HISTORY]
        for start, end in turns[1::2]:
            follows = text.startswith(self._after_reply, end)
            yield start, end + (len(self._after_reply) if follows else 0)

    def _control_token(self, whose: str, token: object) -> ValueError:
        return ValueError(f"{whose} contains the template's special token {token!r}; remove it there")

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _encode_inside(self, text: str) -> list[int]:
        """Ids of a text that does not start a string: after a newline, which merges with nothing, instead of
        a start's space."""
        anchor = self._encode("\n")
        joint = self._encode("\n" + text)
        return joint[len(anchor) :] if joint[: len(anchor)] == anchor else []

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _added_special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
