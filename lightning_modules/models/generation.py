"""Drawing replies: transformers' `generate` with a loop of our own, which a row leaves when its reply ends.

transformers prepares all that surrounds the loop (the model's own generation settings, logits processors,
stopping criteria, positions); its own loop computes a batch until its longest reply ends, and copies all keys
and values at every token. The tokens are the same, sampled ones too.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from lightning_modules.models.decoder import causal_lm, weight_dtype

STAY = 0.75
"""Ended rows leave once at most this share of a batch goes on: their leaving copies the others' keys and
values."""
PER_ROW = ("attention_mask", "position_ids", "token_type_ids")
"""What `generate` keeps of each row beside its cache."""


def generated_ids(
    module: nn.Module,
    prompt_embeds: Float[Tensor, "batch prompt dim"],
    prompt_mask: Tensor,
    settings: GenerationConfig,
) -> list[list[int]]:
    """Ids that continue each prompt, as far as the first stop token, which is the last of a row where it was
    drawn."""
    replies: list[list[int]] = []

    # A closure, since `generate` passes on no arguments of the loop's own and returns tensors alone.
    def loop(
        model: PreTrainedModel,
        input_ids: Int[Tensor, "batch 0"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Int[Tensor, "batch 0"]:
        room = inputs["inputs_embeds"].shape[1] + generation_config.max_length
        _make_room(inputs.get("past_key_values"), room)
        sampled = bool(generation_config.do_sample)
        replies.extend(_replies(model, input_ids, logits_processor, stopping_criteria, sampled, inputs))
        return input_ids

    causal_lm(module).generate(  # type: ignore[operator]
        inputs_embeds=prompt_embeds.to(weight_dtype(module)),
        attention_mask=prompt_mask.long(),
        generation_config=settings,
        custom_generate=loop,
    )
    return replies


def _replies(
    model: Any,
    ids: Int[Tensor, "batch 0"],
    processor: LogitsProcessorList,
    stopping: StoppingCriteriaList,
    sampled: bool,
    inputs: dict[str, Any],
) -> list[list[int]]:
    """The loop itself; `inputs` is what the model is called with, of all rows.

    Only what the model computes is of fewer rows later. Tokens, processors and random numbers are of the
    whole batch throughout: what a row says does not depend on when another ends.
    """
    replies: list[list[int]] = [[] for _ in ids]
    over, first = [False] * len(ids), True
    rows, index = list(range(len(ids))), torch.arange(len(ids), device=ids.device)
    while True:
        fed = model.prepare_inputs_for_generation(
            ids[index], next_sequence_length=None if first else 1, is_first_iteration=first, **inputs
        )
        outputs = model(**fed, return_dict=True)
        inputs, first = model._update_model_kwargs_for_generation(outputs, inputs), False
        drawn = _drawn(outputs.logits[:, -1].float(), ids, index, processor, sampled)
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        # The one copy to the host of a step: whether all have ended decides whether there is another.
        tokens, ended = torch.stack([drawn, stopping(ids, None).to(drawn)]).tolist()
        for row in rows:
            if not over[row]:
                replies[row].append(tokens[row])
                over[row] = bool(ended[row])
        left = [number for number, row in enumerate(rows) if not over[row]]
        if not left:
            return replies
        cache: Any = inputs.get("past_key_values")
        if len(left) <= STAY * len(rows) and _rows_can_leave(cache):
            own = torch.tensor(left, device=ids.device)
            cache.batch_select_indices(own)
            inputs |= {name: inputs[name][own] for name in PER_ROW if inputs.get(name) is not None}
            rows, index = [rows[number] for number in left], index[own]


def _drawn(
    scores: Float[Tensor, "row vocabulary"],
    ids: Int[Tensor, "batch token"],
    index: Int[Tensor, " row"],
    processor: LogitsProcessorList,
    sampled: bool,
) -> Int[Tensor, " batch"]:
    """The next token of every row of the batch, `index` being those whose scores are known."""
    if not sampled and not processor:
        return ids.new_zeros(len(ids)).index_copy(0, index, scores.argmax(-1))
    if len(index) < len(ids):
        scores = scores.new_zeros(len(ids), scores.shape[1]).index_copy(0, index, scores)
    scores = processor(ids, scores)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sampled else scores.argmax(-1)


def _make_room(cache: Any, room: int) -> None:
    """Let layers that keep whole rows keep them in place. Others (sliding windows, states) stay as they
    are."""
    if isinstance(cache, Cache):
        cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def _rows_can_leave(cache: Any) -> bool:
    return isinstance(cache, Cache) and all(hasattr(own, "batch_select_indices") for own in cache.layers)


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer as the beginnings of tensors with room for `room` tokens: a further one is
    written behind them, where concatenating would copy them all."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._whole = [
            states.new_empty(*states.shape[:2], self.room, states.shape[3])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for whole, states in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:end] = states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._whole = [whole[indices] for whole in self._whole]
        self._show(self.get_seq_length())

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (whole[:, :, :end] for whole in self._whole)
        return self.keys, self.values
