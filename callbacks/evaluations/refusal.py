"""Does the model refuse what it should, and only that: refusal on harmful, over-refusal on harmless prompts,
with samples."""

from __future__ import annotations

import torch

from callbacks.evaluations.base import Evaluation, EvaluationRun, Findings, flatten
from callbacks.judges.keyword import KeywordRefusal
from callbacks.metrics.rates import Rate, rates_by_name

METRICS = {"harmful": "harmful/refusal_rate", "harmless": "harmless/over_refusal_rate"}


class RefusalEvaluation(Evaluation):
    """Generates replies to harmful and harmless prompts and counts refusals with the keyword judge (no
    attack)."""

    name = "refusal"

    def evaluate(self, run: EvaluationRun) -> Findings:
        judge = KeywordRefusal()
        findings = Findings({}, details={"judge": f"{judge.name}@{judge.revision}"})
        for subject, metric in METRICS.items():
            if not run.has(subject):  # type: ignore[arg-type]
                continue
            rate = Rate().to(run.module.device)
            by_category = rates_by_name(
                (e.row.category for e in run.data.examples[subject]), run.module.device
            )
            for batch in run.batches(subject, "refusals"):  # type: ignore[arg-type]
                replies = run.clean_replies(batch)
                refused = [judge(p, r) for p, r in zip(batch.prompts, replies, strict=True)]
                rate.update(torch.tensor(refused, device=run.module.device))
                for category, refusal in zip(batch.categories, refused, strict=True):
                    by_category[category].update(torch.tensor([refusal], device=run.module.device))
                rows = zip(batch.keys, batch.prompts, replies, refused, strict=True)
                findings.samples += [
                    {"subject": subject, "key": k, "prompt": p, "reply": r, "refused": f}
                    for k, p, r, f in rows
                ]
            findings.metrics |= flatten(metric, rate)
            if len(by_category) > 1:
                findings.details[subject] = {
                    "by_category": {name or "(none)": found.compute() for name, found in by_category.items()}
                }
        return findings
