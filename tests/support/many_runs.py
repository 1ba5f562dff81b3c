"""Many runs with many rows side by side: run folders made of the recorded quickstart's rows, compared by the
command, and its page timed in Chromium.

    python -m tests.support.many_runs FOLDER [--runs 100] [--rows 10000]     # 2.3 GB at full size

Every run holds `rows` rows of the trained model in the recorded test's sets, and as many of the model before
training; half of them are of one set, as a benchmark's are. Prints the figures.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT
from tests.support.chromium import Page, chromium

SOURCE = ROOT / "experiments" / "results" / "quickstart_cpu_202611"
LARGE = "utility", ""
"""Subject and attack of the set that takes half of a run's rows."""
Lines = list[dict[str, Any]]


def run_folders(root: Path, runs: int, rows: int) -> list[Path]:
    """`runs` folders below `root`, of the stage `test`, each with `rows` rows a model (see the module)."""
    with lzma.open(SOURCE / "rows" / "measurements.jsonl.xz", "rt", encoding="ascii") as stream:
        announced = [json.loads(line) for line in stream]
    # Of `fit` only which weights its training began from.
    began = next(own for own in announced if own["stage"] == "fit" and own["step"] == 0)
    tested = [own for own in announced if own["stage"] == "test"]
    sets: dict[tuple[str, int], Lines] = defaultdict(list)
    with lzma.open(SOURCE / "rows" / "rows_rank0.jsonl.xz", "rt", encoding="ascii") as stream:
        for row in map(json.loads, stream):
            if row["stage"] == "test":
                sets[row["settings"], row["step"]].append(row)
    sizes = _sizes(tested, sets, rows)
    before = "".join(_lines(sets, sizes, None))
    config = yaml.safe_load(_text(SOURCE / "test_config.yaml"))
    folders = []
    for number in range(runs):
        folder = root / f"epsilon_{number // 10}" / f"seed_{number % 10}"
        (folder / "rows").mkdir(parents=True)
        config["seed_everything"] = number % 10
        attacks = config["model"]["init_args"]["attack"]["init_args"]["attacks"]
        attacks[0]["init_args"]["epsilon"] = 0.05 * (1 + number // 10)
        (folder / "test_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        plans = [_of_run(own, number) | {"n": sizes[own["settings"]]} for own in tested]
        with (folder / "rows" / "measurements.jsonl").open("w", encoding="ascii") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in [began, *plans])
        with (folder / "rows" / "rows_rank0.jsonl").open("w", encoding="ascii") as stream:
            stream.write(before)
            stream.writelines(_lines(sets, sizes, number))
        folders.append(folder)
    return folders


def _sizes(tested: Lines, sets: dict[tuple[str, int], Lines], rows: int) -> dict[str, int]:
    """Settings of a set -> its rows of one model: half of all are shared out, the large set has the rest."""
    settings = list(dict.fromkeys(own["settings"] for own in tested))
    large = next(
        own["settings"] for own in tested if (own["subject"], own["attack"]) == LARGE and not own["block"]
    )
    most = max(1, rows // (2 * len(settings)))
    found = {own: min(most, *(len(sets[own, own_step]) for own_step in _steps(sets))) for own in settings}
    found[large] += rows - sum(found.values())
    return found


def _steps(sets: dict[tuple[str, int], Lines]) -> Sequence[int]:
    return sorted({step for _, step in sets})


def _lines(sets: dict[tuple[str, int], Lines], sizes: dict[str, int], number: int | None) -> Iterator[str]:
    """Copies of recorded rows under keys of their own, of the model before training (None) or of run
    `number`, whose verdicts are the opposite in one row of eight."""
    for (settings, step), own in sets.items():
        if bool(step) != (number is not None):
            continue
        for place in range(sizes[settings]):
            copy, at = divmod(place, len(own))
            row = {**own[at], "example": own[at]["example"] + (f"#{copy}" if copy else "")}
            if number is not None:
                row |= {"model": f"{number:016x}", "reply": f"{row['reply']} ({number}.{place})"}
                if (place * 7 + number * 5) % 8 == 0:
                    said = row["verdicts"].items()
                    row["verdicts"] = {judge: was | {"verdict": not was["verdict"]} for judge, was in said}
            yield json.dumps(row) + "\n"


def _of_run(line: dict[str, Any], number: int) -> dict[str, Any]:
    """The trained model is the run's own."""
    return line | ({"model": f"{number:016x}"} if line["step"] else {})


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def command(folders: Sequence[Path], out: Path) -> dict[str, float]:
    """Seconds and peak memory of `thundercat compare`, and MB of what it wrote."""
    words = [
        sys.executable,
        "-m",
        "experiments.cli",
        "compare",
        *map(str, folders),
        "--out",
        str(out),
        "--csv",
    ]
    began = time.monotonic()
    process = subprocess.Popen(words, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, status
    return {
        "compare_seconds": time.monotonic() - began,
        "compare_cpu_seconds": used.ru_utime + used.ru_stime,
        "compare_peak_mb": used.ru_maxrss / 1024,
        "page_mb": (out / "compare.html").stat().st_size / 1e6,
        "data_mb": sum(path.stat().st_size for path in (out / "compare_data").iterdir()) / 1e6,
        "largest_file_mb": max(path.stat().st_size for path in (out / "compare_data").iterdir()) / 1e6,
    }


def in_browser(browser: Page, page: Path) -> dict[str, tuple[float, float]]:
    """Seconds until each answer is on the screen, and the processor's seconds that the browser took for it,
    which depend less on what else the machine does."""
    began, used = time.monotonic(), processor_seconds()
    browser.open(page, 1280)
    opened = time.monotonic() - began + _painted(browser, "")
    found = {"open": (opened, processor_seconds() - used)}
    head = "document.querySelectorAll('#runs thead th:not([hidden]) button')[1]"
    number = browser.js("rowsOf(runs).length - 1")
    last = f"document.querySelector('#runs tr[data-run=\"{number}\"]')"
    typed = "$('{0}').value = '{1}'; $('{0}').dispatchEvent(new Event('input'))"
    chosen = "$('{0}').value = {1}; $('{0}').dispatchEvent(new Event('change'))"
    largest = "[...$('set').options].find((own) => own.value === 'Benign tasks').value"
    steps = {
        "sort": (f"{head}.click()", "true"),
        "sort_back": (f"{head}.click()", "true"),
        "filter_key": (typed.format("find", "s"), "true"),
        "filter_word": (typed.format("find", "seed_1"), "$('count').textContent.split(' ')[0] !== ''"),
        "filter_none": (typed.format("find", ""), "true"),
        "all_columns": ("document.querySelector('.chooser .group').click()", "true"),
        "against_another": (
            chosen.format("baseline", "'1'"),
            "$('pairs').querySelector('[data-run=\"1\"]').hidden",
        ),
        "open_rows": (f"{last}.querySelector('button.open').click()", "$('list').children.length > 0"),
        "largest_set": (
            chosen.format("set", largest),
            f"current.title === {largest} && shown.length === current.n",
        ),
        "rows_key": (typed.format("words", "e"), "shown.length > 0"),
        "rows_word": (typed.format("words", "(0.7"), "true"),
        "rows_all": (typed.format("words", ""), "shown.length === current.n"),
        "beside": (chosen.format("beside", "'1'"), "beside"),
    }
    for name, (action, until) in steps.items():
        used = processor_seconds()
        found[name] = _painted(browser, action, until), processor_seconds() - used
    return found


def processor_seconds() -> float:
    """Of all processes that this one has started, and those that they have."""
    parents, used = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        number = int(path.parent.name)
        parents[number], used[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    own, found = {os.getpid()}, set[int]()
    while own:
        own = {number for number, parent in parents.items() if parent in own}
        found |= own
    return sum(used[number] for number in found) / os.sysconf("SC_CLK_TCK")


def _painted(browser: Page, action: str, until: str = "true") -> float:
    """Seconds from an action until `until` holds and a frame has been drawn since."""
    script = f"""(async () => {{
      const began = performance.now(), frame = () => new Promise((done) => requestAnimationFrame(done));
      {action};
      while (!({until})) {{
        if (performance.now() - began > 120000) throw new Error({json.dumps(until)});
        await new Promise((done) => setTimeout(done, 5));
      }}
      await frame(); await frame();
      return (performance.now() - began) / 1000;
    }})()"""
    seconds: float = browser.js(script)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where run folders and page are written; must be empty")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=10_000)
    call = parser.parse_args()
    folders = run_folders(call.folder / "runs", call.runs, call.rows)
    for name, value in command(folders, call.folder / "out").items():
        print(f"{name}: {value:.3g}", flush=True)
    with chromium() as browser:
        for name, (wall, used) in in_browser(browser, call.folder / "out" / "compare.html").items():
            print(f"{name}: {wall:.2f} s, {used:.2f} s of the processor", flush=True)


if __name__ == "__main__":
    main()
