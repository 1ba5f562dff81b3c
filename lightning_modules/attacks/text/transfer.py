"""Transfer: what was found on one model (or for other requests) is replayed on this one; no search."""

from __future__ import annotations

import logging
import random
from typing import Literal

from datamodules.fields import Count, checked
from lightning_modules.attacks.suffix.stored import StoredSuffixes
from lightning_modules.attacks.text.choosers import Chooser
from lightning_modules.attacks.text.rewrites import Rewrite
from lightning_modules.attacks.text.variants import Variant

log = logging.getLogger(__name__)

Whose = Literal["own", "others", "all"]


class Stored:
    """A request in what a run put around requests, its own first, those of others as they are drawn.

    Args:
        suffixes: where they are read.
        whose: only what was found for the request itself, only for others, or both.
        limit: variants per request.
    """

    def __init__(self, suffixes: StoredSuffixes, whose: Whose, limit: Count) -> None:
        self.suffixes = suffixes
        self.whose = whose
        self.limit = limit

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        """The plain request, and a warning, where there is nothing else. Raises: as StoredSuffixes."""
        request = prompt.strip()
        found = self.suffixes.surroundings()
        own = [entry for entry in found if entry.request == request and self.whose != "others"]
        others = [entry for entry in found if entry.request != request and self.whose != "own"]
        # In their order an attack's come together, and the first one's would be all that the limit leaves.
        rng.shuffle(others)
        texts = [f"{entry.before}{request}{entry.after}" for entry in [*own, *others]]
        if not texts:
            log.warning(
                "transfer: %s holds nothing for %r, which is sent as it is", self.suffixes.run, request
            )
            return [Variant(prompt)]
        return [Variant(text) for text in dict.fromkeys(texts)][: self.limit]


@checked
class TransferSuffixes(Rewrite):
    """Suffixes that a run's attacks found, put to this model (transfer, arXiv 2307.15043 section 3.2).

    Args:
        run: the run folder whose rows are read.
        attacks: names of its attacks; null for all.
        judge: as StoredSuffixes: whose yes counts there; null takes failures too.
        whose: `own` replays what was found for the same request, `others` only what was found for other
            requests (in an order drawn for every request), `all` both, the own first.
        num_samples: variants per request.
        chooser: which variant becomes the attack; null takes the one under which the target is likeliest.
            FirstSuccess tries them in turn.
    """

    def __init__(
        self,
        run: str,
        attacks: list[str] | None = None,
        judge: str | None = "target_prefix",
        whose: Whose = "all",
        num_samples: Count = 16,
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__(Stored(StoredSuffixes(run, attacks, judge), whose, num_samples), chooser)
