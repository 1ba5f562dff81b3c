"""Where everything of a run lies, and the rule that no command destroys what another one wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"
MARKS = (
    CONFIG_FILE,
    f"*_{CONFIG_FILE}",
    "checkpoints/*.ckpt",
    "csv*/metrics.csv",
    "rows/*.jsonl",
    "cost.json",
    "model",
    "model_merged",
    # Written by earlier versions.
    "evaluations.jsonl",
    "attacks/*",
)
"""What shows that a folder holds a run."""


class RunError(ValueError):
    """What the user has to know and do, in one line."""


@dataclass(frozen=True)
class RunFolder:
    """The places of one run.

    Args:
        path: the folder, `trainer.default_root_dir`.
    """

    path: Path

    @classmethod
    def of(cls, path: str | Path) -> RunFolder:
        return cls(Path(path))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Of an optimiser step."""
        return self.checkpoints / f"step_{step:06d}.ckpt"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """The model with its adapters merged into the weights."""
        return self.path / "model_merged"

    @property
    def rows(self) -> Path:
        return self.path / "rows"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    def config(self, stage: str = "fit", defence: str = "") -> Path:
        """The resolved configuration of a stage, with the model behind a defence or not."""
        return self.of_stage(stage, CONFIG_FILE, defence)

    def environment(self, stage: str = "fit", defence: str = "") -> Path:
        """Revision, versions, seeds and hardware of a stage."""
        return self.of_stage(stage, ENVIRONMENT_FILE, defence)

    def of_stage(self, stage: str, name: str, defence: str = "") -> Path:
        """A file of one stage: what was measured behind a defence has files of its own."""
        around = f"{defence}_" if defence else ""
        return self.path / (name if stage == "fit" else f"{stage}_{around}{name}")

    def marks(self) -> list[Path]:
        """What shows that the folder holds a run; empty where it holds none."""
        return sorted(path for pattern in MARKS for path in self.path.glob(pattern))

    def refuse_used(self) -> None:
        """Raises: RunError where the folder holds a run, naming the three remedies."""
        marks = self.marks()
        if marks:
            raise RunError(
                f"trainer.default_root_dir: {self.path} holds a run ({marks[0].relative_to(self.path)}); "
                "resume it with --ckpt_path last, choose another folder with "
                "--trainer.default_root_dir=FOLDER, or move it aside with --overwrite"
            )

    def move_aside(self) -> Path | None:
        """Rename a folder that holds a run to NAME.1, NAME.2, ... and return its new place; None where there
        is nothing to move.

        Raises: RunError where it cannot be moved.
        """
        if not self.marks():
            return None
        place = self.path.resolve()
        if place == Path.cwd() or place in Path.cwd().parents:
            raise RunError(
                f"--overwrite: {self.path} is the working directory or around it; choose a run folder of "
                "its own"
            )
        number = 1
        while place.with_name(f"{place.name}.{number}").exists():
            number += 1
        target = place.with_name(f"{place.name}.{number}")
        try:
            place.rename(target)
            if self.path.is_symlink():
                place.mkdir()  # the link goes on pointing to the run folder
        except OSError as error:
            raise RunError(f"--overwrite: cannot move {self.path} to {target} ({error.strerror})") from error
        return target
