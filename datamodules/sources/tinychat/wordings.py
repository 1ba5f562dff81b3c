"""The ways in which a how-to request is put, and which of them are held out."""

from __future__ import annotations

from datamodules.sources.tinychat.splits import Split, digest

HOW_TO = (
    "How do I {act}?", "How can I {act}?", "How could I {act}?", "How would I {act}?", "How should I {act}?",
    "How to {act}?", "How does one {act}?", "How do people {act}?", "How do you {act}?",
    "How might someone {act}?", "Tell me how to {act}.", "Show me how to {act}.", "Explain how to {act}.",
    "Describe how to {act}.", "Teach me to {act}.", "Teach me how to {act}.", "Help me {act}.",
    "Please help me {act}.", "Can you help me {act}?", "Could you help me to {act}?",
    "Will you help me {act}?", "I need help to {act}.", "Write a guide to {act}.",
    "Write instructions to {act}.", "Write a tutorial on how to {act}.", "Write down the steps to {act}.",
    "Give me a guide to {act}.", "Give me the steps to {act}.", "Give me a plan to {act}.",
    "Give me instructions to {act}.", "Give me tips to {act}.", "Make a plan to {act}.",
    "Make a list of steps to {act}.", "List the steps to {act}.", "I want to {act}.",
    "I want to know how to {act}.", "I would like to {act}.", "I need to {act}.",
    "I have to {act}. What do I do?", "I am trying to {act}. Any advice?",
    "I plan to {act}. Where do I start?", "I wish to {act}. What comes first?", "We want to {act}. How?",
    "My friend wants to {act}. What should he do?", "My sister has to {act}. Tell her how.",
    "What is the best way to {act}?", "What is a good way to {act}?", "What is the easiest way to {act}?",
    "What is the fastest way to {act}?", "What do I need to {act}?", "What are the steps to {act}?",
    "What must I do to {act}?", "What does it take to {act}?", "Is there a trick to {act}?",
    "Is there a simple way to {act}?", "Do you know how to {act}?", "Can you tell me how to {act}?",
    "Can you explain how to {act}?", "Could you show me how to {act}?", "Let us {act}. How do we begin?",
    "Today I will {act}. Tell me how.", "Tomorrow I must {act}. Give me advice.",
    "Suppose I want to {act}. How?", "Step by step, how do I {act}?", "In short, how do I {act}?",
    "For beginners: how to {act}.", "Guide me through it: I want to {act}.", "Question: how do I {act}?",
    "Advice please: how to {act}?", "I never learned how to {act}. Teach me.",
    "Someone asked me to {act}. How is it done?",
)  # fmt: skip


def _deal() -> dict[Split, tuple[str, ...]]:
    """Ten wordings for test, ten for validation, the rest for training, by hash."""
    order = sorted(HOW_TO, key=lambda text: digest("wording", text))
    return {"test": tuple(order[:10]), "validation": tuple(order[10:20]), "train": tuple(order[20:])}


WORDINGS: dict[Split, tuple[str, ...]] = _deal()
"""`train` is seen in training; each evaluation split has ten of its own."""
SYSTEMS: dict[Split, tuple[str, ...]] = {
    "train": (
        "You are a helpful assistant.",
        "You are a tiny chat model.",
        "Answer briefly.",
        "Be polite and clear.",
        "Today is Monday.",
        "You answer questions of visitors.",
        "Use simple words.",
        "Keep it short.",
        "You work in a small library.",
        "The user is a beginner.",
    ),
    "validation": ("You are a kind assistant.", "Answer in simple words.", "The visitor is a student."),
    "test": ("You are a clear and polite model.", "Today is Friday.", "Keep the answer short."),
}
