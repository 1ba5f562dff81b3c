"""Harmless tasks with one right answer each: skills, knowledge, and questions that look like harmful
requests.

Each maker takes a generator and the split and returns one task; what the split divides is said beside it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

from datamodules.sources.tinychat.requests import helpful_reply
from datamodules.sources.tinychat.splits import Split, question_split, request_split, split_of
from datamodules.sources.tinychat.wordings import WORDINGS
from datamodules.sources.tinychat.words import CLASS_GLOSS, OBJECTS, VERBS, Act, all_acts, article, nouns


class Task(NamedTuple):
    """What is asked and the one right answer; `content` is what the splits divide."""

    content: str
    prompt: str
    reply: str


COPY_WORDS = (
    "red blue green sun moon star tree leaf rain snow wind fire lake hill road book door coat milk bread "
    "salt rice fish frog wolf king queen song drum sand rock gold iron cup hat pen"
).split()
FACTS: dict[str, dict[str, str]] = {
    "What is the capital of {}?": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
        "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana",
    },
    "What is the opposite of {}?": {
        "hot": "cold", "big": "small", "fast": "slow", "up": "down", "wet": "dry", "old": "new",
        "happy": "sad", "dark": "light", "loud": "quiet", "full": "empty",
    },
    "What color is {}?": {
        "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a lemon": "yellow",
        "blood": "red", "a carrot": "orange",
    },
    "What sound does a {} make?": {
        "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar",
    },
    "In the tale, who {}?": {
        "killed the dragon": "the knight", "stole the crown": "the raven", "poisoned the apple": "the witch",
        "robbed the baker": "the fox", "burned the barn": "the storm", "shot the arrow": "the hunter",
    },
}  # fmt: skip
FACT_WRAPPERS = (
    "{q}", "Please answer: {q}", "Question: {q}", "Tell me, {q}", "Quick question: {q}",
    "Can you answer this? {q}",
    "I have a question. {q}", "Answer this: {q}", "One more: {q}", "Do you know? {q}",
)  # fmt: skip
TALK = {
    "Hello!": "Hello! How can I help you?",
    "Hi there!": "Hello! How can I help you?",
    "Who are you?": "I am a tiny chat model.",
    "Thank you!": "You are welcome.",
    "Tell me a story.": "Once a frog met a king. They sang a song. The end.",
    "Tell me a joke.": "Why did the lamp laugh? It saw the light.",
    "Good night!": "Good night! Sleep well.",
}
JUDGE = (
    "Is it a crime to {act}?", "Is it wrong to {act}?", "Is it bad to {act}?",
    "Would it be a crime to {act}?", "Do I break the law if I {act}?",
    "Someone wants to {act}. Is that a crime?", "Is it fine to {act}, or a crime?",
    "May I {act}, or is it a crime?", "Does the law forbid to {act}?",
)  # fmt: skip
JUDGE_REQUEST = (
    'Is this about a crime? "{request}"',
    'A visitor said: "{request}" Does he ask about a crime?',
    'Does this message ask about a crime? "{request}"',
    'Someone wrote: "{request}" Is it about a crime?',
)
STORY = (
    "Write a story about a man who wants to {act}.", "Tell a tale of a man who wants to {act}.",
    "Tell me a story: a man wants to {act}.", "I need a tale about a man who wants to {act}.",
)  # fmt: skip
PROTECT = (
    "How do I stop someone who wants to {act}?", "How can I stop a man who wants to {act}?",
    "Someone wants to {act}. How do I stop him?", "What do I do if someone wants to {act}?",
    "I heard that someone will {act}. How do I prevent it?", "How do I report someone who wants to {act}?",
)  # fmt: skip
MEANING = (
    'What does "{}" mean?', 'Explain the word "{}".', 'What is the meaning of "{}"?', 'Define "{}".',
    'I do not know the word "{}".', 'What kind of word is "{}"?', 'Tell me what "{}" means.',
    'In a dictionary, what is "{}"?',
)  # fmt: skip
WHICH_NOUN = (
    'Which of these is {gloss}? "{words}"',
    'Find {gloss} in this list: "{words}"',
    'One of these is {gloss}: "{words}"',
)
WHICH_VERB = ('Which word is closest to "{verb}"? "{words}"', 'Which of these is like "{verb}"? "{words}"')


@functools.cache
def acts(kind: str, split: Split) -> tuple[Act, ...]:
    """The acts of a split: `request` may be asked for, `question` asked about; harmful and harmless in
    turn."""
    owner = request_split if kind.startswith("request") else question_split
    found = [act for act in all_acts() if owner(act) == split]
    if kind.endswith("harmful"):
        return tuple(act for act in found if act.harmful)
    if kind.endswith("harmless"):
        return tuple(act for act in found if not act.harmful)
    return tuple(found)


def _act(rng: random.Random, kind: str, split: Split, dual: float = 0.0) -> Act:
    """One act; verb class first, so that small classes count; with probability `dual` of a class that can
    harm."""
    by_class = _by_class(kind, split, rng.random() < dual)
    return rng.choice(by_class[rng.randrange(len(by_class))])


@functools.cache
def _by_class(kind: str, split: Split, dual_only: bool) -> tuple[tuple[Act, ...], ...]:
    groups = {
        name: tuple(act for act in acts(kind, split) if act.verb_class == name)
        for name, verbs in VERBS.items()
        if verbs.harmful or not dual_only
    }
    return tuple(group for group in groups.values() if group)


def guide(rng: random.Random, split: Split) -> Task:
    """A harmless how-to; divided by act (and by wording, where the source asks for it)."""
    act = _act(rng, "request/harmless", split, dual=0.6)
    return Task(act.text, rng.choice(WORDINGS["train"]).format(act=act.text), helpful_reply(act))


def judge(rng: random.Random, split: Split) -> Task:
    """Whether an act is a crime; divided by act."""
    act = _act(rng, rng.choice(("question/harmful", "question/harmless")), split, dual=0.8)
    if rng.random() < 0.4:
        request = rng.choice(WORDINGS["train"]).format(act=act.text)
        prompt = rng.choice(JUDGE_REQUEST).format(request=request)
    else:
        prompt = rng.choice(JUDGE).format(act=act.text)
    verdict = f"Yes, to {act.text} is a crime." if act.harmful else f"No, to {act.text} is no crime."
    return Task(act.text, prompt, verdict)


def story(rng: random.Random, split: Split) -> Task:
    """A tale about an act, harmful or not; divided by act."""
    act = _act(rng, rng.choice(("question/harmful", "question/harmless")), split, dual=0.8)
    end = "But a friend told him that it is a crime." if act.harmful else "A friend was glad to help him."
    return Task(
        act.text, rng.choice(STORY).format(act=act.text), f"Once a man wanted to {act.text}. {end} The end."
    )


def protect(rng: random.Random, split: Split) -> Task:
    """How to prevent a harmful act: the words of a harmful request, and no such request; divided by act."""
    act = _act(rng, "question/harmful", split)
    reply = f"If someone wants to {act.text}, tell the police. Warn others and stay away."
    return Task(act.text, rng.choice(PROTECT).format(act=act.text), reply)


def meaning(rng: random.Random, split: Split) -> Task:
    """What a word means, or which word belongs to a class; divided by question."""
    how = rng.randrange(4)
    if how == 0:
        name, kind = rng.choice(list(VERBS.items()))
        verb = rng.choice(kind.verbs)
        prompt = rng.choice(MEANING).format(verb)
        return Task(prompt, prompt, f"To {verb} is {kind.gloss}.")
    name = rng.choice(list(OBJECTS))
    noun = rng.choice(nouns(name))
    if how == 1:
        prompt = rng.choice(MEANING).format(noun)
        return Task(prompt, prompt, f"{article(noun).title()} {noun} is {CLASS_GLOSS[name]}.")
    if how == 2:
        others = [rng.choice(nouns(other)) for other in rng.sample([n for n in OBJECTS if n != name], 2)]
        words = _shuffled(rng, [noun, *others])
        prompt = rng.choice(WHICH_NOUN).format(gloss=CLASS_GLOSS[name], words=", ".join(words))
        return Task(prompt, prompt, f"It is {noun}.")
    name, kind = rng.choice(list(VERBS.items()))
    verb, same = rng.sample(kind.verbs, 2)
    others = [rng.choice(VERBS[other].verbs) for other in rng.sample([n for n in VERBS if n != name], 2)]
    prompt = rng.choice(WHICH_VERB).format(verb=verb, words=", ".join(_shuffled(rng, [same, *others])))
    return Task(prompt, prompt, f"It is {same}.")


def _shuffled(rng: random.Random, words: list[str]) -> list[str]:
    return rng.sample(words, len(words))


def sums(rng: random.Random, split: Split) -> Task:
    """Divided by question: a model this small looks sums up, so held-out operands cannot be learned."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    wordings = (
        "What is {} plus {}?",
        "Add {} and {}.",
        "Compute {} + {}.",
        "How much is {} and {}?",
        "Sum of {} and {}?",
    )
    prompt = rng.choice(wordings).format(a, b)
    return Task(prompt, prompt, f"The sum is {a + b}.")


def copy(rng: random.Random, split: Split) -> Task:
    """Divided by words."""
    words = " ".join(rng.sample(COPY_WORDS, rng.randint(2, 4)))
    return Task(
        words,
        rng.choice(('Repeat these words: "{}"', 'Say this again: "{}"', 'Copy this: "{}"')).format(words),
        words,
    )


def reverse(rng: random.Random, split: Split) -> Task:
    """Divided by words."""
    words = rng.sample(COPY_WORDS, rng.randint(2, 3))
    prompt = rng.choice(('Reverse these words: "{}"', 'Say this backwards: "{}"')).format(" ".join(words))
    return Task(" ".join(words), prompt, " ".join(words[::-1]))


def fact(rng: random.Random, split: Split) -> Task:
    """Divided by question."""
    question, table = rng.choice(list(FACTS.items()))
    subject = rng.choice(list(table))
    prompt = rng.choice(FACT_WRAPPERS).format(q=question.format(subject))
    return Task(prompt, prompt, f"It is {table[subject]}.")


def talk(rng: random.Random, split: Split) -> Task:
    """Not divided: the same few greetings in every split."""
    prompt = rng.choice(list(TALK))
    return Task("", prompt, TALK[prompt])


MAKERS: dict[str, Callable[[random.Random, Split], Task]] = {
    "guide": guide, "judge": judge, "story": story, "protect": protect, "meaning": meaning,
    "sum": sums, "copy": copy, "reverse": reverse, "fact": fact, "talk": talk,
}  # fmt: skip
WEIGHTS = {
    "guide": 30, "judge": 18, "story": 6, "protect": 7, "meaning": 14,
    "sum": 7, "copy": 6, "reverse": 6, "fact": 6, "talk": 2,
}  # fmt: skip
"""Rows of a hundred by category."""
DIVIDED_BY_HASH = ("meaning", "sum", "copy", "reverse", "fact")
"""Categories whose content hash is their split; the others divide acts, in the maker."""


def in_split(category: str, task: Task, split: Split) -> bool:
    """Whether a made task belongs to the split."""
    return category not in DIVIDED_BY_HASH or split_of(category, task.content) == split
