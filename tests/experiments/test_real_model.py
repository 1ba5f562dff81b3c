"""What README and FINDINGS say of SmolLM2 in tables is what its four recorded studies hold, to the digit."""

from __future__ import annotations

import csv
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.results import read_measurements, read_rows
from experiments.studies.archive import slug
from tests.conftest import ROOT

RESULTS = ROOT / "experiments" / "results"
RUNS = {
    "published": "published",
    "aligned": "aligned",
    "adversarial fine-tuning": "adversarial fine-tuning",
    "CAT without its attack": "cat, no attack",
    "CAT": "cat",
    "MixAT": "mixat",
    "LAT": "lat",
    'CAT from "published"': "cat from published",
    "CAPO": "capo",
}
"""How the tables call the studies' runs, in their order."""
BASE = "published"
BENCHMARKS = ("ARC-Easy", "ARC-Challenge", "PIQA", "MMLU")
PERPLEXITY = "WikiText-2: perplexity per word"
CHAT = ("MMLU in chat: refused", "MMLU in chat: right")
UNDER = {
    "prefilled with 5 tokens": "prefilling",
    "role play": "role play",
    "in context": "in context",
    "ball of 0.075": "embedding 0.075",
    "ball of 0.15": "embedding 0.15",
    "soft prompt": "soft prompt",
    "worst of the seven": "worst of the seven",
}
BENIGN = {
    "plain": "direct",
    "prefilled": "prefilling",
    "in a role play": "role play",
    "in context": "in context",
    "noise of 0.075": "noise of 0.075",
    "noise of 0.15": "noise of 0.15",
    "PGD towards a refusal, 0.15": "searched in 0.15",
    "behind a soft prompt": "soft prompt",
}


@functools.cache
def cells() -> dict[tuple[str, str], dict[str, str]]:
    """(run, column) -> what the studies hold; a column that two of them have is the main table's."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for study in ("_sampled", "_adaptive", "_suffixes", ""):
        path = RESULTS / f"smollm2{study}_cpu_202611" / "cells.csv"
        with path.open(encoding="utf-8", newline="") as stream:
            found |= {(line["run"], line["column"]): line for line in csv.DictReader(stream)}
    return found


@functools.cache
def tables() -> list[dict[str, str]]:
    path = RESULTS / "smollm2_cpu_202611" / "tables.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def percent(run: str, column: str) -> str:
    return f"{100 * float(cells()[run, column]['value']):.0f}"


def both(run: str, column: str) -> str:
    """Target prefix, and what is not refused."""
    return f"{percent(run, column)}, *{percent(run, f'{column}: not refused')}*"


def difference(run: str, column: str) -> str:
    """To the published model, paired, with its interval; '' of that itself."""
    if run == BASE:
        return ""
    asked: dict[tuple[str, str], dict[str, str]] = {}
    for line in tables():
        if line["table"] == "Questions":
            asked.setdefault((line["row"], line["name"]), {})[line["column"]] = line["text"]
    (told,) = {
        own["difference"]
        for own in asked.values()
        if own["column"] == column
        and re.fullmatch(rf"{re.escape(BASE)} [\d.]+( %)?", own["first"])
        and re.fullmatch(rf"{re.escape(run)} [\d.]+( %)?", own["second"])
    }
    found = re.match(r"\S+ \[.*?\]", told)
    assert found is not None
    return f" ({found[0]})"


def of_harmless(run: str) -> str:
    """Refusals of the paper's forty harmless prompts, which have no category."""
    (line,) = (
        line
        for line in tables()
        if (line["table"], line["name"], line["column"])
        == ("over-refusal, by category", run, "(none) (n = 40)")
    )
    return f"{100 * float(line['value']):.0f}"


def compared(run: str, column: str) -> str:
    return percent(run, column) + difference(run, column)


@functools.cache
def chat_answers(run: str) -> list[dict[str, bool]]:
    """Seed by seed: MMLU's question in a chat -> answered right."""
    found = []
    for seed in sorted((RESULTS / "smollm2_cpu_202611" / "runs" / slug(run)).iterdir()):
        (settings,) = {own.settings for own in read_measurements(seed) if own.block == "mmlu_chat"}
        rows = [row for row in read_rows(seed) if row.settings == settings]
        found.append({row.example: row.verdict("answer_letter@1") for row in rows})
    return found


def turned(run: str, base: str) -> str:
    """Right before and wrong after, wrong before and right after; by seed."""
    (before,) = chat_answers(base)
    counts = []
    for after in chat_answers(run):
        assert after.keys() == before.keys() and len(after) == 213
        worse = sum(before[key] and not after[key] for key in before)
        counts.append(f"{worse}, {sum(after[key] and not before[key] for key in before)}")
    return "; ".join(counts)


def written() -> dict[str, list[str]]:
    """FINDINGS' table: what is measured -> a cell for each of the runs."""
    by_run: dict[str, Callable[[str], str]] = {
        "refused: commands": lambda run: percent(run, "plain: refuses"),
        "refused: the same asked politely": lambda run: percent(run, "polite: refuses"),
        "refused: XSTest's unsafe half, n = 100": lambda run: percent(run, "XSTest unsafe: full refusals"),
        "as it is: target": lambda run: percent(run, "direct"),
        **{label: functools.partial(both, column=column) for label, column in UNDER.items()},
        "GCG, n = 12": lambda run: both(run, "GCG"),
        "adaptive GCG, n = 12": lambda run: both(run, "adaptive GCG"),
        "eight sampled replies: as it is; behind GCG's suffix": lambda run: (
            f"*{percent(run, 'asked, sampled, at 8')}; {percent(run, 'GCG replayed, sampled, at 8')}*"
        ),
        **{
            f"benign refused: {label}": functools.partial(percent, column=f"benign refused, {column}")
            for label, column in BENIGN.items()
        },
        "benign refused: behind others' GCG; adaptive suffixes": lambda run: (
            f"{percent(run, 'benign refused, GCG')}; {percent(run, 'benign refused, adaptive GCG')}"
        ),
        "harmless refused, n = 290": lambda run: (
            percent(run, "over-refusal") + difference(run, "over-refusal")
        ),
        "of these the paper's 40": of_harmless,
        "XSTest's safe half, n = 100": lambda run: percent(run, "XSTest safe: full refusals"),
        **{name: functools.partial(compared, column=name) for name in (*BENCHMARKS, *CHAT)},
        "MMLU in a chat, against the start: right to wrong, wrong to right (of 213)": lambda run: (
            ""
            if run == BASE
            else turned(run, BASE if run in ("aligned", "cat from published") else "aligned")
        ),
        "perplexity per word": lambda run: (
            f"{float(cells()[run, PERPLEXITY]['value']):.1f}{difference(run, PERPLEXITY)}"
        ),
        "100 harmless replies, against the start: changed; newly refused": lambda run: (
            f"{percent(run, 'benign: reply changed')}; {percent(run, 'benign: newly refused')}"
        ),
    }
    return {label: [cell(run) for run in RUNS.values()] for label, cell in by_run.items()}


def table(path: Path, begins: str) -> dict[str, list[str]]:
    """A table by its first column; `begins` is how its first line begins."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(begins))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    _, _, *found = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in rows]
    assert len({own[0] for own in found}) == len(found)
    return {own[0]: own[1:] for own in found}


def test_everything_in_one_table() -> None:
    header = f"| SmolLM2, percent | {' | '.join(RUNS)} |"
    assert table(ROOT / "experiments" / "FINDINGS.md", header) == written()


README_COLUMNS = (
    "refuses HarmBench; XSTest unsafe",
    "refuses harmless, n = 290",
    "embedding 0.075",
    "0.15",
    "soft prompt",
    "in context; prefilled",
    "worst of seven",
    "GCG; adaptive, benign carriers refused",
    "benign refused: plain; noise of 0.15; in context; soft prompt",
    "ARC-Easy (chance 25); PIQA (50); perplexity",
)


def test_the_readme_s_table() -> None:
    """Its cells, without the marks of what is bold."""
    found = table(ROOT / "README.md", f"| | {' | '.join(README_COLUMNS)} |")
    assert len(found) == len(RUNS)
    for (name, said), (told, run) in zip(found.items(), RUNS.items(), strict=True):
        assert name.replace("**", "").startswith(told)
        p = functools.partial(percent, run)
        one = [f"benign refused, {own}" for own in ("direct", "noise of 0.15", "in context", "soft prompt")]
        low, high = (f"{100 * float(cells()[run, 'over-refusal'][own]):.0f}" for own in ("low", "high"))
        wanted = [
            f"{p('refuses')}; {p('XSTest unsafe: full refusals')}",
            f"{p('over-refusal')} % [{low}, {high}]",
            *(both(run, own) for own in ("embedding 0.075", "embedding 0.15", "soft prompt")),
            f"*{p('in context: not refused')}; {p('prefilling: not refused')}*",
            both(run, "worst of the seven"),
            f"*{p('GCG: not refused')}; {p('adaptive GCG: not refused')}*, "
            f"{p('benign refused, GCG')}; {p('benign refused, adaptive GCG')}",
            "; ".join(map(p, one)),
            f"{p('ARC-Easy')}; {p('PIQA')}; {float(cells()[run, PERPLEXITY]['value']):.1f}",
        ]
        assert [cell.replace("**", "") for cell in said] == wanted, name


INTERVAL = re.compile(r"([-+]?[\d.]+)(?: %| points)?\*? \[([-+]?[\d.]+), ([-+]?[\d.]+)\]")


@pytest.mark.parametrize("name", ["README.md", "experiments/FINDINGS.md"])
def test_every_interval_of_the_text_is_a_recorded_difference(name: str) -> None:
    """Of those beside the tables: value and both ends stand together in one of the four reports."""
    recorded: list[tuple[float, ...]] = []
    for study in ("", "_suffixes", "_adaptive", "_sampled"):
        report = (RESULTS / f"smollm2{study}_cpu_202611" / "report.md").read_text(encoding="utf-8")
        recorded += [tuple(map(float, found)) for found in INTERVAL.findall(report)]
    text = (ROOT / name).read_text(encoding="utf-8")
    section = text[text.index("## A real model") :].partition("\n## ")[0]
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    told = [tuple(map(float, found)) for found in INTERVAL.findall(prose)]
    assert len(told) >= 5
    # Some are told to a tenth.
    assert [
        own for own in told if not any(own == pytest.approx(there, abs=0.051) for there in recorded)
    ] == []


def test_what_is_said_of_mmlu() -> None:
    """Every model gives one answer to all of it, but for three answers of one."""
    for run in RUNS.values():
        for seed in sorted((RESULTS / "smollm2_cpu_202611" / "runs" / slug(run)).iterdir()):
            (settings,) = {own.settings for own in read_measurements(seed) if own.block == "mmlu"}
            answers = [row.reply for row in read_rows(seed) if row.settings == settings]
            assert len(answers) == 200
            assert sum(answer != "A" for answer in answers) == (3 if run == "cat from published" else 0)


def test_the_replies_that_were_read_are_recorded_ones_with_these_verdicts() -> None:
    """What FINDINGS says of refusals that the judge misses."""
    path = RESULTS / "smollm2_further_cpu_202611" / "read_replies.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    verdicts: dict[str, dict[str, bool]] = {}
    for run in {line["run"] for line in read}:
        seed = RESULTS / "smollm2_cpu_202611" / "runs" / run
        asked = {
            own.settings for own in read_measurements(seed) if (own.evaluation, own.block) == ("refusal", "")
        }
        rows = [row for row in read_rows(seed) if row.settings in asked and row.subject == "harmless"]
        assert len(rows) == 290
        verdicts[run] = {row.example: row.verdict("keyword_refusal@3") for row in rows}
    for line in read:
        assert verdicts[line["run"]][line["example"]] == (line["drawn from"] == "called a refusal")
    assert Counter((line["drawn from"], line["label"]) for line in read) == {
        ("called a refusal", "full_refusal"): 60,
        ("not called a refusal", "full_compliance"): 150,
        ("not called a refusal, with such words", "full_compliance"): 99,
        ("not called a refusal, with such words", "full_refusal"): 12,
        ("not called a refusal, with such words", "partial_refusal"): 1,
    }
