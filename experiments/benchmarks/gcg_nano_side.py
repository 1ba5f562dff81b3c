"""nanoGCG's side of gcg_nano.py, run by the interpreter of an environment that holds nanogcg: reads a job a
line, answers with a line. It imports nothing of this project.

Where it is started: `gcg_nano_side.py MODEL_FOLDER`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    import nanogcg  # type: ignore[import-not-found]
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(torch.get_num_threads())
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    # transformers 4 reads neither the class that 5 writes nor a template in a file of its own.
    folder = Path(sys.argv[1])
    own = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {
        name: own[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if own.get(name)
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    passed = [0]

    def counted(module: Any, args: Any, options: dict[str, Any]) -> None:
        embeds = options.get("inputs_embeds")
        # Candidates are passed without a gradient, and so is the prefix: as ids, or once.
        if embeds is not None and not torch.is_grad_enabled():
            passed[0] += embeds.shape[0]

    model.register_forward_pre_hook(counted, with_kwargs=True)
    names = ("nanogcg", "transformers", "torch")
    print(json.dumps({name: version(name) for name in names}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        passed[0], began = 0, time.perf_counter()
        best = []
        for request, target in job["behaviours"]:
            settings = nanogcg.GCGConfig(
                num_steps=job["steps"],
                search_width=job["width"],
                topk=job["topk"],
                seed=job["seed"],
                verbosity="ERROR",
            )
            messages = [{"role": "user", "content": request}]
            best.append(nanogcg.run(model, tokenizer, messages, target, settings).best_loss)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "candidates": passed[0], "best_loss": best}), flush=True)


if __name__ == "__main__":
    main()
