"""Lines of a results store that are none, torn, packed or copied: named, and never lost in silence."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.report.load import load
from datamodules import line_files
from datamodules.results import ResultsStore, read_measurements, read_rows
from tests.support.rows import measurement, row, stored

Run = Callable[..., tuple[int, str, str]]


def lines() -> dict[str, bytes]:
    good = json.dumps({key: value for key, value in vars(row("a")).items() if key != "where"})
    return {
        "a list": b"[]",
        "a number": b"5",
        "not JSON": b"{nonsense",
        "another schema": good.replace('"schema": 2', '"schema": 99').encode(),
        "a field too few": good.replace('"reply": "c", ', "").encode(),
        "a field too many": good.replace('"reply"', '"more": 1, "reply"').encode(),
        "a wrong type": good.replace('"reply": "c"', '"reply": 7').encode(),
        "a wrong stage": good.replace('"fit"', '"train"').encode(),
        "NaN": good.replace('"seconds": 0.0', '"seconds": NaN').encode(),
        "deep nesting": b"[" * 100_000,
        "no UTF-8": good.encode().replace(b'"reply": "c"', b'"reply": "\xff"'),
        "a verdict of another kind": good.replace('"verdict": false', '"verdict": "no"').encode(),
    }


@pytest.mark.parametrize("kind", [*lines()])
def test_b_a_line_that_is_no_row_is_named(kind: str, tmp_path: Path) -> None:
    stored(tmp_path, row("a"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    path.write_bytes(path.read_bytes() + lines()[kind] + b"\n" + path.read_bytes())
    for reader in (read_rows, ResultsStore):
        with pytest.raises(ValueError, match=r"rows_rank0.jsonl:2: .*; remove the line") as found:
            reader(tmp_path)
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 600


def test_b_a_torn_last_line_counts_as_not_written(tmp_path: Path) -> None:
    stored(tmp_path, row("a"), row("b"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [own.example for own in read_rows(tmp_path)] == ["a"]
    stored(tmp_path, row("b"))
    assert [own.example for own in read_rows(tmp_path)] == ["a", "b"]


def test_compressed_rows_are_the_same_rows_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    stored(tmp_path, row("a"), row("b"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    plain, before = path.read_bytes(), read_rows(tmp_path)
    line_files.pack(path, path.parent)
    packed = path.with_name("rows_rank0.jsonl.xz")
    first = packed.read_bytes()
    line_files.pack(path, path.parent)
    assert packed.read_bytes() == first
    path.unlink()
    assert read_rows(tmp_path) == before and len(before) == 2
    for damage in (first[:-5], first[:30] + b"\0\0\0" + first[33:], b"no xz"):
        packed.write_bytes(damage)
        with pytest.raises(ValueError, match=r"rows_rank0.jsonl.xz: damaged \(.*; fetch or write .* again"):
            read_rows(tmp_path)
    packed.unlink()
    path.with_name("rows_rank0.jsonl.gz").write_bytes(gzip.compress(plain))  # as records were kept before
    assert read_rows(tmp_path) == before


@pytest.mark.parametrize(
    ("ending", "damaged", "said"),
    [
        (".gz", lambda plain: b"", "it holds no line"),
        (".xz", lambda plain: b"", "it has no end"),
        (".xz", lambda plain: lzma.compress(plain) + b"more", "it goes on behind its end"),
        (".xz", lambda plain: lzma.compress(plain)[:-3], "it has no end"),
        (".xz", lambda plain: lzma.compress(plain[:-1]), "its last line has no end"),
        (".gz", lambda plain: gzip.compress(plain[:-1]), "its last line has no end"),
    ],
)
def test_a_packed_file_loses_no_line_unsaid(
    ending: str, damaged: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    stored(tmp_path, row("a"), row("b"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    path.with_name(path.name + ending).write_bytes(damaged(path.read_bytes()))
    path.unlink()
    with pytest.raises(ValueError, match=rf"rows_rank0.jsonl{ending}: damaged \({said}\); fetch or write"):
        read_rows(tmp_path)


def test_whole_lines_alone_are_packed(tmp_path: Path) -> None:
    stored(tmp_path, row("a"), row("b"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # a kill
    line_files.pack(path, tmp_path)
    first = whole[: whole.index(b"\n") + 1]
    assert lzma.decompress((tmp_path / "rows_rank0.jsonl.xz").read_bytes()) == first
    path.write_bytes(whole[:20])
    line_files.pack(path, path.parent)
    assert [own.name for own in path.parent.iterdir()] == ["rows_rank0.jsonl"]


def test_a_packed_folder_that_goes_on_is_read_with_what_was_added_to_it(tmp_path: Path) -> None:
    stored(tmp_path, row("a"), row("b"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    line_files.pack(path, path.parent)
    plain = path.read_bytes()
    path.unlink()
    changed = replace(row("a"), reply="of another day")
    for _ in range(2):  # a restart writes nothing again
        stored(tmp_path, changed)
        assert [own.reply for own in read_rows(tmp_path)] == ["of another day", row("b").reply]
    assert path.read_bytes().count(b"\n") == 1
    path.with_name("rows_rank0.jsonl.gz").write_bytes(gzip.compress(plain))
    with pytest.raises(ValueError, match=r"jsonl.xz: .* packed as rows_rank0.jsonl.gz too; remove the older"):
        read_rows(tmp_path)


def test_an_archive_holds_what_was_packed_and_what_came_after(tmp_path: Path) -> None:
    source, target = tmp_path / "run", tmp_path / "archive"
    (target / "rows").mkdir(parents=True)
    stored(source, row("a"))
    ResultsStore(source).announce([measurement(n=1)])
    for path in [*(source / "rows").iterdir()]:
        line_files.pack(path, path.parent)
        path.unlink()
    stored(source, row("b"))
    ResultsStore(source).announce([measurement(quantity="refusal_rate", n=2)])
    line_files.pack_all(source / "rows", target / "rows")
    assert read_rows(target) == read_rows(source)
    assert [own.example for own in read_rows(target)] == ["a", "b"]
    assert [own.n for own in read_measurements(target)] == [1, 2]


def test_a_copy_under_another_ending_is_nobody_s_lines(tmp_path: Path) -> None:
    stored(tmp_path, row("a"))
    ResultsStore(tmp_path).announce([measurement(n=3)])
    for path in [*(tmp_path / "rows").iterdir()]:
        path.with_name(f"{path.name}.bak").write_bytes(path.read_bytes())
    ResultsStore(tmp_path).announce([measurement(n=4)])
    stored(tmp_path, replace(row("a"), reply="later"))
    assert [own.n for own in read_measurements(tmp_path)] == [4]
    assert [own.reply for own in read_rows(tmp_path)] == ["later"]


def test_a_kill_while_packing_leaves_the_earlier_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:40])
        raise KeyboardInterrupt

    stored(tmp_path, row("a"))
    path = tmp_path / "rows" / "rows_rank0.jsonl"
    line_files.pack(path, path.parent)
    stored(tmp_path, row("b"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            line_files.pack(path, path.parent)
    path.unlink()
    assert [own.example for own in read_rows(tmp_path)] == ["a"]


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "5"])
def test_b_a_damaged_cost_file_is_named(content: str, tmp_path: Path) -> None:
    plan = measurement()
    ResultsStore(tmp_path).announce([plan])
    stored(tmp_path, row("a", plan))
    (tmp_path / "cost.json").write_text(content)
    with pytest.raises(ValueError, match=r"cost.json: .*; remove the file") as found:
        load(tmp_path)
    assert "\n" not in str(found.value)
