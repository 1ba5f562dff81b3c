"""A small language model that learns to write suffixes against the model in training: generator against
discriminator.

AdvPrompter's alternation (Paulus et al. 2024, arXiv 2404.16873, algorithms 1 and 2): the generator proposes
next tokens, a beam search keeps those under which the model's harmful target is likely, and the generator
learns to write what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import AdversarialBatch, pad
from datamodules.fields import Count, NonNegative, NonNegativeInt, Positive, checked
from lightning_modules.attacks.base import AttackedPrompt, draw_seed, example_rngs
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import typable_tokens
from lightning_modules.attacks.training.per_rank import exchanged, gathered, own_states, process
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.loading import ModelConfig, load_seeded
from lightning_modules.models.reply import Reply


@dataclass
class _Beam:
    """An unfinished suffix and the generator's negative log-likelihood of it."""

    suffix: list[int]
    nll: float = 0.0


@checked
class SuffixGenerator:
    """Writes a suffix per prompt by a beam search that the generator steers, then trains the generator on the
    suffixes.

    A candidate q is scored by weight_target * CE(harmful target | x, q) + mean NLL of q under the generator.
    Passes are counted of the model, not of the generator. Every process trains a generator on what all of
    them have found (`share`), so that they stay alike; a checkpoint holds them all. Where the number of
    processes has changed, process r resumes with the generator of process r modulo the old number.

    Args:
        generator: the language model that writes; it needs the model's tokenizer.
        num_tokens: length of the suffix [30].
        candidates: next tokens sampled from the generator for each beam [48].
        beams: suffixes kept after every token [4].
        weight_target: lambda [100].
        temperature: of the random choice of beams by their score, which is divided by lambda first [0.6]; 0
            keeps the best.
        lr: learning rate of the generator, AdamW [5e-4].
        updates: optimiser steps of the generator per batch [8].
        buffer_size: latest (prompt, suffix) pairs it learns from [256].
        batch_size: pairs per update [8].
        ascii_only: write only tokens of printable ASCII.
        max_rows: candidates per forward pass; null takes 64 on a CPU and 512 elsewhere; halved and remembered
            when memory runs out.
        seed: seed of the generator's fresh weights, where it has any.
    """

    def __init__(
        self,
        generator: ModelConfig,
        num_tokens: Count = 30,
        candidates: Count = 48,
        beams: Count = 4,
        weight_target: Positive = 100.0,
        temperature: NonNegative = 0.6,
        lr: Positive = 5e-4,
        updates: NonNegativeInt = 8,
        buffer_size: Count = 256,
        batch_size: Count = 8,
        ascii_only: bool = True,
        max_rows: Count | None = None,
        seed: NonNegativeInt | None = None,
    ) -> None:
        self.generator = generator
        self.num_tokens = num_tokens
        self.candidates = candidates
        self.beams = beams
        self.weight_target = weight_target
        self.temperature = temperature
        self.lr = lr
        self.updates = updates
        self.buffer_size = buffer_size
        self.batch_size = batch_size
        self.ascii_only = ascii_only
        self.max_rows = max_rows
        self.seed = 0 if seed is None else seed
        self._writer: LanguageModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._buffer: list[tuple[list[int], list[int]]] = []
        self._found: list[tuple[list[int], list[int], int]] = []
        """Prompts and suffixes that it has not learned from yet, with the seed of doing so."""
        self._pending: dict[str, Any] | None = None

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch, then train the generator, which several processes do in `share`. Raises:
        ValueError without texts or with another vocabulary."""
        writer = self._loaded(model)
        with model.frozen(), writer.frozen():
            # The writing starts from nothing: " x" only finds the place after the request.
            search = SuffixSearch(model, batch, 1, " x", self.max_rows, lead=1)
            proposals = SuffixSearch(writer, batch, 1, " x", self.max_rows, lead=1)
            allowed = typable_tokens(model.chat, embedding_weight(model).shape[0], self.ascii_only)
            rngs = example_rngs(batch, rng)
            search.record_start()
            beams = {row: [_Beam([])] for row in range(len(batch))}
            for _ in range(self.num_tokens):
                if not beams:
                    break
                beams = self._grow(search, proposals, beams, allowed, rngs)
            attacked = search.result()
            seed = draw_seed(rng or torch.Generator().manual_seed(self.seed))
            # The writer reads what it proposed after: everything before the suffix, template included.
            self._found = [
                (slot.before, suffix, seed)
                for slot, suffix in zip(search.slots, search.ledger.best, strict=True)
            ]
        if process()[1] == 1:
            self.share(model)
        return attacked

    def share(self, model: LanguageModel) -> None:
        """Train the generator on what all processes have found since."""
        found, self._found = exchanged(self._found), []
        if found:
            self._buffer += [(before, suffix) for before, suffix, _ in found]
            del self._buffer[: -self.buffer_size]
            self._learn(self._loaded(model), torch.Generator().manual_seed(found[0][2]))

    def _grow(
        self,
        search: SuffixSearch,
        proposals: SuffixSearch,
        beams: dict[int, list[_Beam]],
        allowed: Bool[Tensor, " vocabulary"],
        rngs: list[torch.Generator],
    ) -> dict[int, list[_Beam]]:
        """One more token for every beam of every row."""
        flat = [(row, beam) for row, own in beams.items() for beam in own]
        owners = torch.tensor([row for row, _ in flat], device=search.start.device)
        suffixes = torch.tensor([beam.suffix for _, beam in flat], dtype=torch.long, device=owners.device)
        logits = proposals.chunked(proposals.next_token_logits, owners, suffixes).cpu()
        log_chances = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
        grown: list[tuple[int, _Beam]] = []
        for (row, beam), own in zip(flat, log_chances, strict=True):
            chances = own.exp()
            count = min(self.candidates, int((chances > 0).sum()))
            for token in torch.multinomial(chances, count, generator=rngs[row]).tolist():
                grown.append((row, _Beam([*beam.suffix, token], beam.nll - own[token].item())))
        texts = search.texts([row for row, _ in grown], [beam.suffix for _, beam in grown])
        grown = [entry for entry, text in zip(grown, texts, strict=True) if text is not None]
        if not grown:
            return {}
        index = torch.tensor([row for row, _ in grown], device=owners.device)
        candidates = torch.tensor([beam.suffix for _, beam in grown], device=owners.device)
        losses = search.mean(index, search.losses(index, candidates)).cpu()
        fluency = torch.tensor([beam.nll / len(beam.suffix) for _, beam in grown])
        scores = losses + fluency / self.weight_target
        places: dict[int, list[int]] = {}
        for i, (row, _) in enumerate(grown):
            places.setdefault(row, []).append(i)
        best = {row: min(own, key=lambda i: float(losses[i])) for row, own in places.items()}
        search.ledger.record(
            list(best), [grown[i][1].suffix for i in best.values()], losses[list(best.values())]
        )
        return {
            row: [grown[i][1] for i in self._chosen(own, scores, rngs[row])]
            for row, own in sorted(places.items())
        }

    def _chosen(self, places: list[int], scores: Float[Tensor, " row"], rng: torch.Generator) -> list[int]:
        """The beams that go on: drawn without replacement in proportion to exp(-score / temperature), by
        Gumbel noise."""
        merits = -scores[places]
        if self.temperature > 0:
            # Both logarithms must stay finite at the ends of the interval: `rand` may give 0.
            uniform = torch.rand(len(places), generator=rng).clamp_min(1e-20)
            merits = merits / self.temperature - (-uniform.log()).clamp_min(1e-20).log()
        return [places[i] for i in merits.topk(min(self.beams, len(places))).indices.tolist()]

    def _learn(self, writer: LanguageModel, rng: torch.Generator) -> None:
        """Regress the generator on pairs of the buffer: CE of the suffix after its prompt."""
        assert self._optimizer is not None
        for _ in range(self.updates):
            picked = torch.randperm(len(self._buffer), generator=rng)[: self.batch_size].tolist()
            prompts, prompt_mask = pad([self._buffer[i][0] for i in picked], "left")
            suffixes, suffix_mask = pad([self._buffer[i][1] for i in picked], "right")
            device = writer.device
            reply = Reply(suffixes.to(device), suffix_mask.to(device))
            with torch.enable_grad():
                (log_probs,) = writer.reply_log_probs(
                    writer.embed(prompts.to(device)), prompt_mask.to(device), reply
                )
                loss = mean_cross_entropy(log_probs, reply.mask).mean()
                learning = self._optimizer.param_groups[0]["params"]
                for weight, gradient in zip(learning, torch.autograd.grad(loss, learning), strict=True):
                    weight.grad = gradient
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _loaded(self, model: LanguageModel) -> LanguageModel:
        """The generator with its optimiser, loaded at the first call. Raises: ValueError for another
        vocabulary."""
        if self._writer is None:
            # Evaluation mode throughout: the generator's own dropout would make a resumed run differ.
            weights = load_seeded(self.generator, self.seed).to(model.device).eval()
            self._writer = LanguageModel(weights, chat=model.chat)
            self._optimizer = torch.optim.AdamW(
                [p for p in weights.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0
            )
            if self._pending is not None:
                weights.load_state_dict(self._pending["weights"])
                self._optimizer.load_state_dict(self._pending["optimizer"])
                self._pending = None
        rows = embedding_weight(self._writer).shape[0], embedding_weight(model).shape[0]
        if rows[0] != rows[1]:
            raise ValueError(
                f"SuffixGenerator.generator: expected the model's vocabulary of {rows[1]} tokens, got "
                f"{rows[0]}; use one tokenizer"
            )
        return self._writer

    def state_dict(self) -> dict[str, Any]:
        """The generators' weights, their optimisers and their buffers, of all processes."""
        state: dict[str, Any] = {"buffer": [list(pair) for pair in self._buffer]}
        if self._pending is not None:
            state |= self._pending
        elif self._writer is not None and self._optimizer is not None:
            state |= {"weights": self._writer.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        return gathered(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError for a state without generators."""
        states = own_states(state, self)
        own = states[process()[0] % len(states)]
        self._buffer = [(list(prompt), list(suffix)) for prompt, suffix in own["buffer"]]
        self._writer = self._optimizer = None
        self._pending = {key: own[key] for key in ("weights", "optimizer")} if "weights" in own else None
