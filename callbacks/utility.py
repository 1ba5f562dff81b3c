"""Is the model still useful: exact match on benign tasks with one right reply, also by category."""

from __future__ import annotations

from collections import defaultdict

import torch

from callbacks.evaluation import Evaluation, EvaluationRun, Findings, flatten
from callbacks.judges.exact import ExactMatch
from callbacks.metrics.rates import Rate


class UtilityEvaluation(Evaluation):
    """Generates replies to benign tasks and compares them with the expected ones."""

    name = "utility"

    def evaluate(self, run: EvaluationRun) -> Findings:
        judge = ExactMatch()
        findings = Findings({}, details={"judge": f"{judge.name}@{judge.revision}"})
        rate = Rate().to(run.module.device)
        by_category: dict[str, list[bool]] = defaultdict(list)
        for batch in run.batches("utility", "utility"):
            replies = run.clean_replies(batch)
            right = [judge(p, r, e) for p, r, e in zip(batch.prompts, replies, batch.references, strict=True)]
            rate.update(torch.tensor(right, device=run.module.device))
            rows = zip(batch.categories, batch.prompts, replies, batch.references, right, strict=True)
            for category, prompt, reply, expected, ok in rows:
                by_category[category].append(ok)
                findings.samples.append({"category": category, "prompt": prompt, "reply": reply, "expected": expected, "right": ok})
        findings.metrics |= flatten("utility/exact_match", rate)
        findings.details["by_category"] = {name: sum(ok) / len(ok) for name, ok in by_category.items()}
        return findings
