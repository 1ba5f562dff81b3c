"""Directional ablation: the attacked model cannot represent the direction along which it refuses (Arditi et
al. 2024, arXiv 2406.11717)."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Positive, Share, checked
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource
from datamodules.sources.gather import Source
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.embedding.pgd import target_loss
from lightning_modules.attacks.ledger import Ledger
from lightning_modules.models.adapters import switches
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.frozen import FrozenCopy
from lightning_modules.models.language_model import Encoded, LanguageModel, encoded
from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.refusal_direction import Direction, ablated, chosen, mean_differences
from lightning_modules.models.requests import Request

R = TypeVar("R", HarmfulRow, ChatRow)


@checked
class DirectionalAblation:
    """Removes the model's refusal direction from its residual stream; the prompts stay as they are. White
    box: it needs the weights, and is found anew for every model that it meets.

    Args:
        harmful: requests that the model refuses; none that an evaluation asks.
        harmless: requests that it answers, of the same form.
        num_fit: requests of each kind that a mean is taken of.
        num_validation: the next requests of each kind, on which the candidate is chosen.
        num_positions: how many of the prompt's last positions are tried.
        max_kl: largest change of the first token's distribution on harmless requests, in nats [0.1 there].
            Small models may have no direction within it that also induces refusals (a warning): try more.
        max_depth: the deepest layer tried, as a share of them [0.8 there].
        found_in: find it in this model instead, with the same tokenizer and width, such as the one that
            training began from: a model may hide its own direction and still fall to that one. Null: in the
            attacked model.
    """

    def __init__(
        self,
        harmful: HarmfulSource,
        harmless: ChatSource,
        num_fit: Count = 128,
        num_validation: Count = 32,
        num_positions: Count = 3,
        max_kl: Positive = 0.1,
        max_depth: Share = 0.8,
        found_in: ModelConfig | None = None,
    ) -> None:
        self.harmful, self.harmless = harmful, harmless
        self.num_fit, self.num_validation = num_fit, num_validation
        self.num_positions = num_positions
        self.max_kl, self.max_depth = max_kl, max_depth
        self.found_in = found_in
        self._found: tuple[str, Direction] | None = None

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch; its loss is that under the ablation. Raises: ValueError where the sources hold
        too few requests."""
        vector = self.direction(model).vector
        ledger = Ledger(len(batch), batch.prompt_ids.device)
        every = torch.arange(len(batch), device=batch.prompt_ids.device)
        with torch.no_grad(), model.frozen(), ablated(model, vector):
            loss = target_loss(model, batch, model.embed(batch.prompt_ids), every)
        ledger.count_forward(every)
        ledger.enter(every, loss)
        return replace(ledger.attacked(batch.prompt_ids, batch.prompt_mask), ablated=vector)

    def direction(self, model: LanguageModel) -> Direction:
        """The direction of these weights and adapters, or of the other model's; looked for once as long as
        they stay the same."""
        if self.found_in is not None:
            if self._found is None:
                with FrozenCopy(self.found_in).active(model) as other:
                    self._found = "", self._find(LanguageModel(other.module, model.chat))
            return self._found[1]
        computed = f"{fingerprint(model.module)} {switches(model.module)}"
        if self._found is None or self._found[0] != computed:
            with model.frozen():
                self._found = computed, self._find(model)
        return self._found[1]

    def differences(self, model: LanguageModel) -> dict[int, Float[Tensor, " dim"]]:
        """Decoder layer -> the difference of the means of `num_fit` requests of each kind after it, at the
        prompt's last token."""
        harmful, harmless = (
            _first(name, getattr(self, name), self.num_fit) for name in ("harmful", "harmless")
        )
        prompts = _prompts(model, [*harmful, *harmless])
        bad, good = _part(prompts, 0, self.num_fit), _part(prompts, self.num_fit, 2 * self.num_fit)
        with model.frozen():
            found = mean_differences(model, bad, good, num_positions=1)
        return {own.layer: own.vector for own in found}

    def _find(self, model: LanguageModel) -> Direction:
        harmful = _first("harmful", self.harmful, self.num_fit + self.num_validation)
        harmless = _first("harmless", self.harmless, self.num_fit + self.num_validation)
        cut, prompts = self.num_fit, _prompts(model, [*harmful, *harmless])
        bad, good = _part(prompts, 0, len(harmful)), _part(prompts, len(harmful), len(prompts.prompt_ids))
        candidates = mean_differences(model, _part(bad, 0, cut), _part(good, 0, cut), self.num_positions)
        refusals = {_begins(model, row) for row in harmful}
        return chosen(
            model,
            candidates,
            _part(bad, cut, len(harmful)),
            _part(good, cut, len(harmless)),
            sorted(refusals),
            self.max_kl,
            self.max_depth,
        )


def _first(field: str, source: Source[R], count: int) -> list[R]:
    rows = list(islice((row for row in source.rows() if not isinstance(row, RowProblem)), count))
    if len(rows) < count:
        raise ValueError(
            f"DirectionalAblation.{field}: expected {count} requests (num_fit + num_validation), got "
            f"{len(rows)}; lower them, or give a larger source"
        )
    return rows


def _prompts(model: LanguageModel, rows: list[HarmfulRow | ChatRow]) -> Encoded:
    return encoded(model, [Request(row.prompt, row.system) for row in rows])


def _part(prompts: Encoded, start: int, stop: int) -> Encoded:
    return Encoded(prompts.prompt_ids[start:stop], prompts.prompt_mask[start:stop])


def _begins(model: LanguageModel, row: HarmfulRow) -> int:
    """The first token of a row's refusal."""
    return model.chat.reply(model.chat.prompt(row.prompt, row.system), row.safe_reply)[0]
