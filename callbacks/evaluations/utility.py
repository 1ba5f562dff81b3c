"""Is the model still useful: exact match on benign tasks with one right reply, also by category."""

from __future__ import annotations

import torch

from callbacks.evaluations.base import Evaluation, EvaluationRun, Findings, flatten
from callbacks.judges.exact import ExactMatch
from callbacks.metrics.rates import Rate, rates_by_name


class UtilityEvaluation(Evaluation):
    """Generates replies to benign tasks and compares them with the expected ones."""

    name = "utility"

    def evaluate(self, run: EvaluationRun) -> Findings:
        judge = ExactMatch()
        findings = Findings({}, details={"judge": f"{judge.name}@{judge.revision}"})
        rate = Rate().to(run.module.device)
        by_category = rates_by_name((e.row.category for e in run.data.examples["utility"]), run.module.device)
        for batch in run.batches("utility", "utility"):
            replies = run.clean_replies(batch)
            right = [judge(p, r, e) for p, r, e in zip(batch.prompts, replies, batch.expected, strict=True)]
            rate.update(torch.tensor(right, device=run.module.device))
            rows = zip(batch.categories, batch.prompts, replies, batch.expected, right, strict=True)
            for category, prompt, reply, expected, ok in rows:
                by_category[category].update(torch.tensor([ok], device=run.module.device))
                findings.samples.append(
                    {
                        "category": category,
                        "prompt": prompt,
                        "reply": reply,
                        "expected": expected,
                        "right": ok,
                    }
                )
        findings.metrics |= flatten("utility/exact_match", rate)
        findings.details["by_category"] = {name: rates.compute() for name, rates in by_category.items()}
        return findings
