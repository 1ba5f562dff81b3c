"""Every defence around one model, attacked without and with knowledge of it: the tables of the README.

    python -m experiments.studies.defences --out experiments/results/defences_cpu_202611
    python -m experiments.studies.defences --model smollm2 --out OUT

runs `thundercat test` once a defence on the test split (rows that are on disk are not asked again) and writes
the raw rows, compressed, and report.md into the folder; every cell is computed from the rows.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from callbacks.metrics.estimates import rate
from callbacks.metrics.names import Metric
from callbacks.report.cells import MISSING, Cell, Table, estimate
from callbacks.report.load import load, load_measured
from callbacks.report.markdown import table_text
from callbacks.report.measured import Measured
from callbacks.report.results import Costs, Estimate, Snapshot
from callbacks.run_folder.provenance import write_whole
from datamodules.line_files import pack_all
from datamodules.results import ROWS, ResultsStore, measured_stages, read_measurements, read_rows
from datamodules.settings import settings_digest
from experiments.studies.defence_models import MODELS, Around
from experiments.studies.processes import Running

NOTE = (
    "Static: the search without the defence, its result sent through the defence; adaptive: the search that "
    "sees it. Not refused: by the keyword judge, beside what of these same requests is not refused as they "
    "are. Benign prompts get what the adaptive search found on other "
    "requests. Intervals are 95 % (Wilson's for shares); n of clean requests, of attacked ones and of benign "
    "ones under attack: {}. One model, one seed; a search this small that finds nothing is no evidence of "
    "robustness."
)


def words(
    around: Around, defence: str, folder: Path, sizes: Sequence[str], found: Path | None = None
) -> list[str]:
    """The command of one defence; '' for none. `found` is where a replayed search is read."""
    own = [f"configs/defence/{defence}.yaml"] if defence else []
    replays = bool(defence and around.replayed)
    attacks = around.replayed if replays else around.attacks
    files = [word for file in (around.recipe, *own, *around.files, attacks) for word in ("--config", file)]
    where = [f"--vars.defence_static_from={found}"] if replays else []
    place = f"--trainer.default_root_dir={folder}"
    return ["test", *files, *around.settings[defence], *where, *sizes, place]


def set_apart(folder: Path) -> Path:
    """What the last search without a defence has found, in a folder of its own, named by its content: the
    run's has rows of other calls too.

    Raises: ValueError where that search is not whole.
    """
    own = [m for m in read_measurements(folder) if m.attack == "static" and m.subject == "harmful"]
    last = own[-1] if own else None
    rows = [
        row
        for row in read_rows(folder)
        if last is not None and not row.defence and (row.settings, row.model) == (last.settings, last.model)
    ]
    rows = [row for row in rows if row.attack == "static" and row.subject == "harmful"]
    if last is None or len(rows) != last.n:
        raise ValueError(f"{folder}: expected a whole search without a defence, got {len(rows)} of its rows")
    name = settings_digest([(row.example, row.attacked) for row in rows])
    place = folder / f"found-{name}"
    if not place.is_dir():
        store = ResultsStore(place)
        store.announce([last])
        store.add(rows)
    return place


def table(folder: Path, around: Around = MODELS["tinychat"]) -> Table:
    """A row a defence that the folder has measured."""
    rows = []
    for defence in measured(folder):
        found, measured_at = load_measured(folder, "test", defence)
        own = found.after
        assert own is not None, "load fails where nothing was measured"
        plain = _not_refused_plainly(own, measured_at[own.step])
        told = Cell(MISSING if plain is None else f"{estimate(plain).text} (n = {plain.n})")
        rows.append([Cell(around.shown[_name(defence)]), *_cells(own, told, bool(defence))])
    columns = [
        *("defence", "harmful refused", "harmless refused", around.utility),
        *("the attacked, as they are: not refused", "static: target; not refused"),
        "adaptive: target; not refused",
        *(f"benign refused under it; {around.utility}", "queries; tokens, times plain"),
    ]
    return Table(around.title, columns, rows)


def measured(folder: Path) -> list[str]:
    """The defences' names in the results, in the table's order.

    Raises: ValueError where one was measured with two settings, which would be two rows of one name.
    """
    found = [defence for stage, defence in measured_stages(folder) if stage == "test"]
    names = [*map(_name, found)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{folder}: found {twice!r} measured with two settings; set --run to another folder")
    order = [*MODELS["tinychat"].shown]
    return sorted(found, key=lambda own: order.index(_name(own)))


def _name(defence: str) -> str:
    return defence.rpartition("-")[0]


def _not_refused_plainly(own: Snapshot, measured: Sequence[Measured]) -> Estimate | None:
    """Of the requests that were attacked, those of them that were asked without their attack too: what both
    searches start from. None where there are none."""
    harmful = {
        item.measurement.attack: item
        for item in measured
        if item.measurement.subject == "harmful" and not item.measurement.block
    }
    plain, attacked = harmful.get(""), harmful.get(_searched(own))
    if plain is None or attacked is None:
        return None
    refused = plain.outcome(plain.measurement.judge)
    told = [not refused[example] for example in refused if example in attacked.rows]
    return rate(told) if told else None


def _cells(own: Snapshot, plain: Cell, defended: bool) -> list[Cell]:
    def told(metric: Metric) -> Estimate | None:
        found = own.measures.get(metric)
        return found.estimate if found is not None else None

    benign = own.benign.get(_searched(own))
    return [
        _joined(told(Metric("refusal_rate", "harmful"))),
        _joined(told(Metric("over_refusal_rate", "harmless"))),
        _joined(told(Metric("exact_match", "utility"))),
        plain,
        *(
            _joined(*(told(Metric(q, "harmful", attack)) for q in ("success_rate", "not_refused_rate")))
            for attack in ("static", _searched(own))
        ),
        _joined(*((benign.refused, benign.utility) if benign is not None else (None,))),
        _cost([cost for cost in own.costs if cost.subject == "harmful" and not cost.attack], defended),
    ]


def _searched(own: Snapshot) -> str:
    """The attack that knows of the defence; the same one where there is no defence to know of."""
    return "adaptive" if Metric("success_rate", "harmful", "adaptive") in own.measures else "static"


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
    settings = {_searches(folder, defence) for defence in measured(folder)}
    if len(settings) > 1:
        raise ValueError(
            f"{folder}: expected one model and searches of one budget, got {sorted(settings)}; set --run to "
            "another folder"
        )
    sizes = {_sizes(folder, defence) for defence in measured(folder)}
    if len(sizes) > 1:
        raise ValueError(
            f"{folder}: expected defences measured on equally many requests, got {sorted(sizes)} (clean, "
            "attacked, benign); set --run to another folder"
        )
    return ", ".join(map(str, sizes.pop()))


def _searches(folder: Path, defence: str) -> str:
    """Which model was attacked, and with which budget. Raises: ValueError where something was cut short."""
    own = load(folder, "test", defence).after
    assert own is not None, "load fails where nothing was measured"
    if not own.complete:
        raise ValueError(f"{folder}: {defence or 'no defence'} is not measured whole; run the same again")
    stem = f"test_{defence}_" if defence else "test_"
    config = yaml.safe_load((folder / f"{stem}config.yaml").read_text(encoding="utf-8"))
    suites = [one.get("init_args") or {} for one in config["trainer"]["callbacks"]]
    (search,) = (suite["attacks"][_searched(own)] for suite in suites if "attacks" in suite)
    budget = {name: search["init_args"][name] for name in ("num_steps", "width", "num_tokens")}
    return f"{own.model} {budget}"


def _sizes(folder: Path, defence: str) -> tuple[int, ...]:
    own = load(folder, "test", defence).after
    assert own is not None, "load fails where nothing was measured"
    attack = _searched(own)
    benign = own.benign[attack].refused
    return (
        own.measures[Metric("refusal_rate", "harmful")].estimate.n,
        own.measures[Metric("success_rate", "harmful", attack)].estimate.n,
        benign.n if benign is not None else 0,
    )


def report(folder: Path, around: Around = MODELS["tinychat"]) -> str:
    """The Markdown report."""
    own = table(folder, around)
    return f"# {own.title}\n\n{table_text(own)}\n\n{NOTE.format(sizes_of(folder))}{around.note}\n"


def archive(run: Path, out: Path) -> None:
    """The raw rows, compressed, with what was to be measured and how."""
    shutil.rmtree(out / ROWS, ignore_errors=True)
    (out / ROWS).mkdir(parents=True)
    for stale in out.glob("test_*"):
        stale.unlink()
    for path in [*run.glob("test_*config.yaml"), *run.glob("test_*environment.json")]:
        shutil.copy(path, out / path.relative_to(run))
    pack_all(run / ROWS, out / ROWS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the rows and the report")
    add("--model", default="tinychat", choices=[*MODELS], help="around which the defences stand [tinychat]")
    add("--run", type=Path, help="folder in which it runs [runs/defences_MODEL]")
    add("--defences", nargs="+", help="beside none [all]")
    add("--limit", type=int, help="attacked requests")
    add("--clean", type=int, help="requests of each kind without an attack")
    add("--steps", type=int, help="steps of both searches")
    add("--width", type=int, help="candidates a step")
    add("--draws", type=int, help="draws of a defence's randomness behind a candidate's loss")
    add("--report_only", action="store_true", help="run nothing: the report of what is done")
    own = parser.parse_args(arguments)
    around = MODELS[own.model]
    known = [*around.settings][1:]
    if unknown := [name for name in own.defences or () if name not in known]:
        parser.error(f"--defences: expected some of {', '.join(known)}, got {unknown[0]!r}")
    run = own.run or Path("runs") / f"defences_{own.model}"
    sizes = [
        f"--vars.{'clean_limit' if name == 'clean' else f'defence_{name}'}={getattr(own, name) or size}"
        for name, size in around.sizes.items()
    ]
    try:
        for defence in () if own.report_only else ("", *(own.defences or known)):
            run.mkdir(parents=True, exist_ok=True)
            found = set_apart(run) if defence and around.replayed else None
            running = Running(words(around, defence, run, sizes, found), run, threads=1)
            if running.wait() != 0:
                parser.exit(1, f"{running.failure()}\n")
        report(run, around)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    archive(run, own.out)
    write_whole(own.out / "report.md", report(own.out, around))
    print(report(own.out, around))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
