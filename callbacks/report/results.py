"""RunResults: all that is reported of a run, typed, computed from its rows; tables and pages only show it.

A Row (datamodules/results.py) is written once, when a reply has been judged; no number is stored beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from callbacks.metrics.estimates import Difference as Difference
from callbacks.metrics.estimates import Estimate as Estimate
from callbacks.metrics.names import Metric
from callbacks.metrics.outcomes import BudgetCurve as BudgetCurve

Stage = Literal["fit", "validate", "test"]


@dataclass(frozen=True)
class Measure:
    """One metric of one snapshot."""

    metric: Metric
    estimate: Estimate
    judge: str = ""
    """`name@revision` of the judge behind it; '' where none is."""
    groups: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """Kind of grouping (`category`, `functional`) -> group -> the same metric within it."""
    settings: str = ""
    """How it was measured (digest of attack, length, seed and rows); only equal ones can be compared."""
    samples: int = 0
    """Sampled replies per example behind it; 0 for greedy ones."""
    values: Mapping[str, float] = field(default_factory=dict)
    """By example, of a mean that is compared on the same examples; empty of others."""
    units: int = 0
    """Tokens, words or bytes behind a perplexity, whose n counts windows; 0 elsewhere."""

    @property
    def title(self) -> str:
        """What a reader sees, by the judge that decides, with k where replies were sampled."""
        title = self.metric.titled(self.judge)
        return f"{title} (k = {self.samples})" if self.samples else title


@dataclass(frozen=True)
class AttackFacts:
    """How one attack went, beside its success."""

    name: str
    typed: bool
    """Whether its results are prompts that a user can type (embeddings and forced replies are not)."""
    settings: str
    loss_curve: Sequence[float]
    """Mean attacked loss at every iterate, in nats per token."""
    flags: Mapping[str, int]
    """Warning sign -> number of examples that raised it."""
    budgets: Mapping[str, BudgetCurve]
    """Unit (`steps`, `passes`, `queries`, `seconds`) -> success within a budget."""


@dataclass(frozen=True)
class UnderAttack:
    """What an attack that was done to benign prompts made of them."""

    refused: Estimate | None
    """Harmless prompts refused; None where there are none."""
    utility: Estimate | None
    """Benign tasks still solved; None where there are none."""
    fall: Difference | None
    """Utility under the attack - utility without one, on the same tasks; None where that was not measured."""
    refuses_what_carries_it: bool
    """At least 20 % of the harmless prompts are refused, or utility falls by at least 20 points: success of
    the attack then says little about harm."""


@dataclass(frozen=True)
class PairedSets:
    """One event in two named sets of the same requests in other words."""

    metric: Metric
    """Of the reworded set."""
    plain: Metric
    """The same of the other set."""
    judge: str
    difference: Difference | None
    """Reworded - plain on the requests that both have; None where there is none."""
    shares: tuple[Estimate, Estimate]
    """Of the event on these requests: plain, reworded."""
    only_plain: int
    """Requests without a partner in the reworded set."""
    only_reworded: int
    """The same the other way round."""


@dataclass(frozen=True)
class Gradings:
    """What became of the gradings of one set of conversations, a grading a turn."""

    judge: str
    asked: int
    missing: int
    """Nothing is on disk: the judge could not be asked, or the evaluation was cut short."""
    unreadable: int
    """The judge said something in which there is no grade from 1 to 10."""
    cut: int
    """Graded replies that are as long as was allowed."""
    beyond_window: int
    """Graded replies that end beyond the positions which the model was made for."""


@dataclass(frozen=True)
class Certified:
    """What is guaranteed of one subject's requests."""

    subject: str
    judge: str
    """What is certified, and with how much noise and how many draws."""
    radii: Sequence[float]
    """Of every request, in multiples of the mean embedding norm; 0 where what one wishes for is not
    certified."""
    tokens: Sequence[int]
    """Tokens of every request over which the radius goes."""
    abstained: int
    """Requests of which nothing is certified."""
    other: int
    """Requests of which the opposite is."""


@dataclass(frozen=True)
class DirectionAt:
    """The refusal direction after one layer, before training and after it; models/direction_change.py."""

    name: str
    """Of the layer; or of the mean over layers."""
    cosine: Estimate
    """Between the two directions."""
    along: float
    length: float
    rank_before: float
    rank: float


@dataclass(frozen=True)
class Costs:
    """What a defence's replies cost, against the same replies without it."""

    subject: str
    attack: str
    n: int
    queries: Estimate
    """Calls of a model per reply."""
    tokens: Estimate
    """Tokens read and written per reply, as a multiple of those of the request and this reply."""
    stopped: Estimate
    """Requests that the defence answered itself."""
    bypassed: int
    """Requests whose attack entered behind the defence."""
    guaranteed: Estimate | None = None
    """Requests that stay refused whatever is added within the defence's threat model; None where it promises
    nothing of the kind."""


@dataclass(frozen=True)
class Attribution:
    """What each token of a request adds to the margin by which one model refuses it."""

    key: str
    category: str
    side: str
    """'' for the run's model, BASE for the one before training."""
    pieces: Sequence[str]
    """The request's attackable tokens."""
    contributions: Sequence[float]
    """In nats; positive towards a refusal."""
    margin: float
    without: float
    """The margin with all of these tokens at the baseline."""

    @property
    def summed(self) -> float:
        """Close to margin - without, where the path has points enough."""
        return math.fsum(self.contributions)


@dataclass(frozen=True)
class SampleRow:
    """One judged reply as a reader sees it."""

    subject: str
    attack: str
    key: str
    category: str
    prompt: str
    attacked: str | None
    """What was sent instead of the prompt, or of its document; None where nobody can type it, or where
    nothing was changed."""
    history: Sequence[tuple[str, str]]
    """Earlier turns that were sent before it."""
    prefill: str
    """What the reply was forced to begin with."""
    expected: str
    """The harmful target, or the one right reply."""
    reply: str
    verdicts: Mapping[str, bool]
    """`name@revision` of a judge -> what it said."""
    base_reply: str | None = None
    """The reply before training to the same, where both were asked at once; None elsewhere."""
    document: str | None = None
    """The untrusted document beside the prompt; None for none."""
    answer: str = ""
    """The reply to the prompt, where `expected` is what the document's hidden instruction wants."""


@dataclass(frozen=True)
class Snapshot:
    """The model at one optimiser step, as one stage measured it."""

    stage: Stage
    step: int
    model: str
    """Fingerprint of the weights."""
    measures: Mapping[Metric, Measure]
    """In the order in which they are reported."""
    attacks: Mapping[str, AttackFacts]
    cross_flags: Mapping[str, int]
    """Warning signs that show only between attacks."""
    samples: Sequence[SampleRow]
    benign: Mapping[str, UnderAttack] = field(default_factory=dict)
    """Attack -> benign prompts under it, where they were measured."""
    paired: Sequence[PairedSets] = ()
    """Named sets against each other, where they ask for the same in other words."""
    gradings: Mapping[str, Gradings] = field(default_factory=dict)
    """Named set of conversations -> what became of its gradings."""
    certified: Sequence[Certified] = ()
    """What is guaranteed, by subject."""
    costs: Sequence[Costs] = ()
    """What a defence costs, by subject and attack; empty without one."""
    divergences: Sequence[Estimate] = ()
    """KL to the base model, in nats, at every token of the harmful targets, from the first on."""
    directions: Sequence[DirectionAt] = ()
    """The refusal direction against the one before training, layer by layer; their mean at the end."""
    attributions: Sequence[Attribution] = ()
    """What single requests' refusals rest on, before training and after."""
    complete: bool = True
    """False where an evaluation was cut short: its numbers are over the rows that are there."""


@dataclass(frozen=True)
class PairedDifference:
    """after - before of one metric on the same examples."""

    metric: Metric
    difference: float
    low: float
    high: float
    n: int
    gained: int
    """Examples with the event after and not before."""
    lost: int
    """Examples with the event before and not after."""
    p_value: float
    """Exact McNemar (two-sided binomial on gained against lost)."""


@dataclass(frozen=True)
class PerplexityDifference:
    """after - before of a perplexity on the same windows, which are resampled in pairs."""

    metric: Metric
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class RunResults:
    """One stage of one run folder."""

    folder: Path
    stage: Stage
    snapshots: Sequence[Snapshot]
    """By step; the one that was measured last stands at the end."""
    differences: Sequence[PairedDifference]
    """Before against after; empty where nothing was measured before the first step of training."""
    cost: Mapping[str, float]
    """What training cost (callbacks/cost.py); empty outside `fit`."""
    training: Sequence[Mapping[str, float]]
    """The training log, a row a step; empty outside `fit`."""
    configuration: Mapping[str, Any]
    environment: Mapping[str, Any]
    set_aside: Sequence[str] = ()
    """Titles of what an earlier snapshot does not show, because the last one measured it in another way."""
    perplexity_differences: Sequence[PerplexityDifference] = ()
    """The same of perplexities."""
    defence: str = ""
    """`name-digest` of the defence around the model; '' for none."""
    compared: bool = False
    """Whether the first snapshot is of the model that this run's training began from, and the last is not."""

    @property
    def before(self) -> Snapshot | None:
        """The model before the first training step, where it was evaluated."""
        first = self.snapshots[0] if self.snapshots else None
        shown = self.compared or self.stage == "fit"
        return first if first is not None and shown and first.step == 0 else None

    @property
    def after(self) -> Snapshot | None:
        """The latest snapshot."""
        return self.snapshots[-1] if self.snapshots else None
