"""What every run has unless its YAML says otherwise: gradients in evaluation, a CSV log, a run folder."""

from __future__ import annotations

from typing import Any

CSV = "callbacks.run_folder.loggers.RunCSVLogger"


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the trainer's defaults filled in; a CSV log beside whatever loggers are
    named, and none with `logger: false`."""
    trainer = dict(config.get("trainer") or {})
    if trainer.get("default_root_dir") is None:
        trainer["default_root_dir"] = "runs/unnamed"
    trainer.setdefault("inference_mode", False)
    # The data deals its rows out to the processes itself; Lightning's sampler would divide them again.
    trainer.setdefault("use_distributed_sampler", False)
    trainer.setdefault("log_every_n_steps", 1)
    loggers = trainer.get("logger")
    loggers = [] if loggers in (None, True) else [loggers] if isinstance(loggers, dict) else loggers
    if isinstance(loggers, list) and not any(logger.get("class_path") == CSV for logger in loggers):
        csv = {"class_path": CSV, "init_args": {"save_dir": trainer["default_root_dir"]}}
        loggers = [csv, *loggers]
    trainer["logger"] = loggers
    return {"seed_everything": 0, **config, "trainer": trainer}
