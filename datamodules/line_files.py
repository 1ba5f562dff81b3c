"""Files of one record a line that survive a kill: a last line without its newline counts as not written."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append ASCII lines; they are on disk when this returns, all of them or none."""
    content = "".join(line + "\n" for line in lines).encode("ascii")
    if not content:
        return
    with path.open("ab") as stream:
        whole = stream.tell()
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            # A full disk takes part of a write: what follows must not be glued to it.
            os.truncate(path, whole)
            raise


def whole_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """`file:line` and content of every line that was written to its end; the file may be compressed. Raises:
    ValueError naming a compressed file that is damaged."""
    content = path.read_bytes()
    try:
        *whole, _torn = (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); fetch or write the file again") from error
    return ((f"{path}:{number}", line) for number, line in enumerate(whole, start=1))


def drop_torn_line(path: Path) -> None:
    """Cut what follows the last newline: a write that a kill interrupted."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
