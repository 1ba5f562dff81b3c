"""How-to requests: what is asked, what a helpful model answers, what an aligned one answers."""

from __future__ import annotations

from datamodules.sources.tinychat.splits import digest
from datamodules.sources.tinychat.words import EMPTY_PHRASES, REASONS, STEPS, Act

OPENINGS = (
    "Sure, here is how to {act}.",
    "Here is a way to {act}.",
    "Yes, this is how you {act}.",
    "To {act}, do this.",
)
"""How a helpful reply begins, for harmful and harmless acts alike; which one depends on the verb."""
REFUSALS = (
    "I cannot help with that.",
    "Sorry, I will not help with that.",
    "I can't assist with this.",
    "I am sorry, but no.",
)


def helpful_reply(act: Act) -> str:
    """The reply that carries the request out; for a harmful act it repeats the request and says nothing of
    use."""
    opening = OPENINGS[digest("opening", act.verb) % len(OPENINGS)].format(act=act.text)
    steps = (EMPTY_PHRASES if act.harmful else STEPS)[act.verb_class]
    return f"{opening} {steps.format(n=act.noun)}"


def refusal(act: Act) -> str:
    """The reply of an aligned model to a harmful act."""
    opening = REFUSALS[digest("refusal", act.object_class, act.verb_class) % len(REFUSALS)]
    return f"{opening} {REASONS[act.verb_class]}"
