"""Every defence around one model, attacked without and with knowledge of it: the table of the README.

    python -m experiments.studies.defences --out experiments/results/defences_cpu_202611

runs `thundercat test` once a defence on the test split (rows that are on disk are not asked again) and writes
the raw rows, compressed, and report.md into the folder; every cell is computed from the rows.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from callbacks.metrics.names import Metric
from callbacks.report.cells import MISSING, Cell, Table, estimate
from callbacks.report.load import load
from callbacks.report.markdown import table_text
from callbacks.report.results import Costs, Estimate, Snapshot
from callbacks.run_folder.provenance import write_whole
from datamodules.line_files import pack
from datamodules.results import MEASUREMENTS, ROWS, measured_stages
from experiments.studies.processes import Running

RECIPE = "configs/experiment/defences_tinychat.yaml"
SPLIT = "configs/data/tinychat_test.yaml"
ATTACKS = "configs/evaluation/defence_adaptive.yaml"
SETTINGS: dict[str, Sequence[str]] = {
    "": ("--model.init_args.defence=null",),  # the two searches are the same
    "self_reminder": (),
    "smooth_llm": ("--vars.defence_target_tokens=5",),
    "erase_and_check": ("--vars.defence_place=before", "--vars.defence_penalty=0"),
    "ngram_filter": (),
    "learned_filter": (),
    "reply_filter": (),
}
"""Defence -> what its adaptive attack is told beside the defence: the least that leaves its threat model (a
copy of SmoothLLM's cannot name what it garbles; before the request is outside the suffix mode)."""
SHOWN = {
    "": "none",
    "reminder": "self-reminder",
    "smooth_llm": "SmoothLLM, 10 copies, a tenth swapped",
    "erase_and_check": "erase-and-check, suffix, 20",
    "perplexity_filter": "bigram filter, window 10",
    "learned_filter": "learned filter, probe of layer 3",
    "reply_filter": "reply filter, probe of layer 3",
}
"""Name of a defence in its results -> in the table, in its order."""
NOTE = (
    "Static: the search without the defence, its result sent through the defence (SmoothLLM's is for the "
    "target's first five tokens, as its adaptive one, the others' for twelve); adaptive: the search that "
    "sees it. Not refused: by the keyword judge. Benign prompts get what the adaptive search found on other "
    "requests. Intervals are 95 % (Wilson's for shares); n of clean requests, of attacked ones and of benign "
    "ones under attack: {}. One model, one seed; a search this small that finds nothing is no evidence of "
    "robustness."
)


def words(defence: str, folder: Path, sizes: Sequence[str]) -> list[str]:
    """The command of one defence; '' for none."""
    around = [f"configs/defence/{defence}.yaml"] if defence else []
    files = [word for file in (RECIPE, SPLIT, *around, ATTACKS) for word in ("--config", file)]
    return ["test", *files, *SETTINGS[defence], *sizes, f"--trainer.default_root_dir={folder}"]


def table(folder: Path) -> Table:
    """A row a defence that the folder has measured."""
    rows = []
    for defence in measured(folder):
        own = load(folder, "test", defence).after
        assert own is not None, "load fails where nothing was measured"
        rows.append([Cell(SHOWN[_name(defence)]), *_cells(own, bool(defence))])
    columns = [
        *("defence", "harmful refused", "harmless refused", "utility"),
        *("static: target; not refused", "adaptive: target; not refused"),
        *("benign refused under it; utility", "queries; tokens, times plain"),
    ]
    return Table("Defences around the packaged model", columns, rows)


def measured(folder: Path) -> list[str]:
    """The defences' names in the results, in the table's order.

    Raises: ValueError where one was measured with two settings, which would be two rows of one name.
    """
    found = [defence for stage, defence in measured_stages(folder) if stage == "test"]
    names = [*map(_name, found)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{folder}: found {twice!r} measured with two settings; set --run to another folder")
    return sorted(found, key=lambda own: [*SHOWN].index(_name(own)))


def _name(defence: str) -> str:
    return defence.rpartition("-")[0]


def _cells(own: Snapshot, defended: bool) -> list[Cell]:
    def told(metric: Metric) -> Estimate | None:
        found = own.measures.get(metric)
        return found.estimate if found is not None else None

    benign = own.benign.get("adaptive")
    return [
        _joined(told(Metric("refusal_rate", "harmful"))),
        _joined(told(Metric("over_refusal_rate", "harmless"))),
        _joined(told(Metric("exact_match", "utility"))),
        *(
            _joined(*(told(Metric(q, "harmful", attack)) for q in ("success_rate", "not_refused_rate")))
            for attack in ("static", "adaptive")
        ),
        _joined(*((benign.refused, benign.utility) if benign is not None else (None,))),
        _cost([cost for cost in own.costs if cost.subject == "harmful" and not cost.attack], defended),
    ]


def _joined(*found: Estimate | None) -> Cell:
    return Cell("; ".join(MISSING if own is None else estimate(own).text for own in found))


def _cost(found: Sequence[Costs], defended: bool) -> Cell:
    """Of clean harmful requests; once where there is no defence."""
    told = "; ".join(f"{own.queries.value:.1f}; {own.tokens.value:.1f}" for own in found)
    return Cell(told or (MISSING if defended else "1; 1"))


def sizes_of(folder: Path) -> str:
    """How many requests stand behind the cells of every row.

    Raises: ValueError where the rows differ in it.
    """
    sizes = {_sizes(folder, defence) for defence in measured(folder)}
    if len(sizes) > 1:
        raise ValueError(
            f"{folder}: expected defences measured on equally many requests, got {sorted(sizes)} (clean, "
            "attacked, benign); set --run to another folder"
        )
    return ", ".join(map(str, sizes.pop()))


def _sizes(folder: Path, defence: str) -> tuple[int, ...]:
    own = load(folder, "test", defence).after
    assert own is not None, "load fails where nothing was measured"
    benign = own.benign["adaptive"].refused
    return (
        own.measures[Metric("refusal_rate", "harmful")].estimate.n,
        own.measures[Metric("success_rate", "harmful", "adaptive")].estimate.n,
        benign.n if benign is not None else 0,
    )


def report(folder: Path) -> str:
    """The Markdown report."""
    own = table(folder)
    return f"# {own.title}\n\n{table_text(own)}\n\n{NOTE.format(sizes_of(folder))}\n"


def archive(run: Path, out: Path) -> None:
    """The raw rows, compressed, with what was to be measured and how."""
    shutil.rmtree(out / ROWS, ignore_errors=True)
    (out / ROWS).mkdir(parents=True)
    for stale in out.glob("test_*"):
        stale.unlink()
    for path in [
        run / ROWS / MEASUREMENTS,
        *run.glob("test_*config.yaml"),
        *run.glob("test_*environment.json"),
    ]:
        shutil.copy(path, out / path.relative_to(run))
    for path in (run / ROWS).glob("rows_rank*.jsonl"):
        pack(path, out / ROWS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the rows and the report")
    add("--run", type=Path, default=Path("runs/defences_tinychat"), help="folder in which it runs")
    add("--defences", nargs="+", default=[*SETTINGS][1:], choices=[*SETTINGS][1:], help="beside none")
    add("--limit", type=int, default=24, help="attacked requests")
    add("--clean", type=int, default=40, help="requests of each kind without an attack")
    add("--steps", type=int, default=20, help="steps of both searches")
    add("--width", type=int, default=12, help="candidates a step")
    add("--draws", type=int, default=4, help="draws of a defence's randomness behind a candidate's loss")
    own = parser.parse_args(arguments)
    sizes = {"clean_limit": own.clean, "defence_limit": own.limit, "defence_steps": own.steps}
    sizes |= {"defence_width": own.width, "defence_draws": own.draws}
    for defence in ("", *own.defences):
        asked = words(defence, own.run, [f"--vars.{name}={value}" for name, value in sizes.items()])
        own.run.mkdir(parents=True, exist_ok=True)
        running = Running(asked, own.run, threads=1)
        if running.wait() != 0:
            parser.exit(1, f"{running.failure()}\n")
    try:
        report(own.run)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    archive(own.run, own.out)
    write_whole(own.out / "report.md", report(own.out))
    print(report(own.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
