"""Does the model refuse what it should, and only that: refusal on harmful, over-refusal on harmless prompts, with samples."""

from __future__ import annotations

import torch

from callbacks.evaluation import Evaluation, EvaluationRun, Findings, flatten
from callbacks.judges.keyword import KeywordRefusal
from callbacks.metrics.rates import Rate

METRICS = {"harmful": "harmful/refusal_rate", "harmless": "harmless/over_refusal_rate"}


class RefusalEvaluation(Evaluation):
    """Generates replies to harmful and harmless prompts and counts refusals with the keyword judge (no attack)."""

    name = "refusal"

    def evaluate(self, run: EvaluationRun) -> Findings:
        judge = KeywordRefusal()
        findings = Findings({}, details={"judge": f"{judge.name}@{judge.revision}"})
        for subject, metric in METRICS.items():
            if not run.has(subject):  # type: ignore[arg-type]
                continue
            rate = Rate().to(run.module.device)
            for batch in run.batches(subject, "refusals"):  # type: ignore[arg-type]
                replies = run.clean_replies(batch)
                refused = [judge(p, r) for p, r in zip(batch.prompts, replies, strict=True)]
                rate.update(torch.tensor(refused, device=run.module.device))
                rows = zip(batch.keys, batch.prompts, replies, refused, strict=True)
                findings.samples += [{"subject": subject, "key": k, "prompt": p, "reply": r, "refused": f} for k, p, r, f in rows]
            findings.metrics |= flatten(metric, rate)
        return findings
