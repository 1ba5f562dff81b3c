"""Around which models the table of defences is measured, and how each defence is attacked there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Settings = Mapping[str, Sequence[str]]
"""Defence -> what its command is told beside the defence's file, the least that lets its adaptive attack
leave its threat model: a copy of SmoothLLM's cannot name what it garbles, and before the request is outside
erase-and-check's suffix mode. '' is no defence."""


@dataclass(frozen=True)
class Around:
    """Which model the defences stand around, and how it is attacked."""

    title: str
    recipe: str
    settings: Settings
    attacks: str
    """Evaluation with both searches; without a defence they are the same, and one is enough."""
    replayed: str = ""
    """Evaluation of a defended model where the static search is not made anew; '' makes it anew."""
    files: Sequence[str] = ()
    """On top of a defence's file."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of requests, and of both searches."""
    utility: str = "utility"
    """What a right answer to a benign task is."""
    note: str = ""
    """What must be known of this model's table."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Name of a defence in its results -> in the table, in its order."""


MODELS = {
    "tinychat": Around(
        "Defences around the packaged model",
        "configs/experiment/defences_tinychat.yaml",
        {
            "": ("--model.init_args.defence=null",),  # the two searches are the same
            "self_reminder": (),
            "smooth_llm": ("--vars.defence_target_tokens=5",),
            "erase_and_check": ("--vars.defence_place=before", "--vars.defence_penalty=0"),
            "ngram_filter": (),
            "learned_filter": (),
            "reply_filter": (),
        },
        "configs/evaluation/defence_adaptive.yaml",
        files=("configs/data/tinychat_test.yaml",),
        note=(
            " SmoothLLM's adaptive search is for the target's first five tokens, since its copies garble "
            "what a target names, erase-and-check's for tokens before the request, outside its suffix "
            "mode."
        ),
        sizes={"clean": 40, "limit": 24, "steps": 20, "width": 12, "draws": 4},
        shown={
            "": "none",
            "reminder": "self-reminder",
            "smooth_llm": "SmoothLLM, 10 copies, a tenth swapped",
            "erase_and_check": "erase-and-check, suffix, 20",
            "perplexity_filter": "bigram filter, window 10",
            "learned_filter": "learned filter, probe of layer 3",
            "reply_filter": "reply filter, probe of layer 3",
        },
    ),
    "smollm2": Around(
        "Defences around SmolLM2-135M-Instruct as published, which answers harmful requests",
        "configs/experiment/defences_smollm2.yaml",
        {
            "": (),
            "self_reminder": (),
            "smooth_llm": ("--vars.defence_target_tokens=5",),
            "erase_and_check_learned": ("--vars.defence_place=before",),
            "perplexity_filter": (),
            "learned_filter": (),
            "reply_filter": (),
        },
        "configs/evaluation/defence_search.yaml",
        "configs/evaluation/defence_replayed.yaml",
        files=("configs/data/smollm2_filters.yaml",),
        sizes={"clean": 24, "limit": 8, "steps": 10, "width": 8},
        utility="replies unchanged",
        note=(
            " SmoothLLM lives by a model's own refusals, of which this one has few; erase-and-check asks the "
            "learned filter instead, is searched for tokens before the request, outside its suffix mode, and "
            "guarantees what that filter flags whole, not what it flags by a shorter request. "
            "SmoothLLM's search is for the target's first five tokens. The aligned model is not shown: "
            "without any defence 15 steps of the search make 0 of 8 replies begin with the target and leave "
            "2 of 8 not refused, where 4 of 24 plain requests are not. Replies unchanged: the undefended "
            "model's own greedy replies to benign instructions, 24 tokens, letter by letter; a defence that "
            "rewords a request changes most of them, for the worse or not."
        ),
        shown={
            "": "none",
            "reminder": "self-reminder",
            "smooth_llm": "SmoothLLM, 10 copies, a tenth swapped",
            "erase_and_check": "erase-and-check, suffix, 20, by the learned filter",
            "perplexity_filter": "perplexity filter, window 10",
            "learned_filter": "learned filter, probe of layer 20",
            "reply_filter": "reply filter, probe of layer 20",
        },
    ),
}
