"""`thundercat list`: what there is to choose from, one line each, from the files themselves.

Nothing is imported: a YAML says what it is in its first comment, a class in its docstring.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator

from experiments.config.errors import PROJECT_ROOT, ConfigError, suggest

FILES = {
    "recipes": ("quickstart.yaml", "experiment/*.yaml"),
    "methods": ("method/*.yaml",),
    "attacks": ("attack/*.yaml",),
    "defences": ("defence/*.yaml",),
    "objectives": ("objective/*.yaml",),
    "terms": ("term/*.yaml",),
    "models": ("model/*.yaml",),
    "data": ("data/*.yaml",),
    "evaluations": ("evaluation/*.yaml",),
    "trainers": ("trainer/*.yaml",),
    "studies": ("study/*.yaml",),
    "sweeps": ("sweep/*.yaml",),
}
"""Kind -> files below configs/, to be given with --config; a study is given to `thundercat study`, a sweep to
`thundercat sweep`."""
CLASSES = {
    "losses": "lightning_modules/losses",
    "sources": "datamodules/sources",
    "judges": "callbacks/judges",
}
"""Kind -> folder of classes, to be named by class_path."""
WIDTH = 160


def listing(kind: str = "all") -> str:
    """The lines of one kind, or of all under their names. Raises: ConfigError for an unknown kind."""
    kinds = (*FILES, *CLASSES)
    if kind == "all":
        return "\n\n".join(f"{name}:\n{listing(name)}" for name in kinds)
    if kind not in kinds:
        raise ConfigError(
            f"list: unknown kind {kind!r}{suggest(kind, kinds)}; known: {', '.join(kinds)}, all"
        )
    rows = list(_files(FILES[kind]) if kind in FILES else _classes(CLASSES[kind]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(_line(name, text, width) for name, text in rows)


def _line(name: str, text: str, width: int) -> str:
    return f"  {name:{width}}  {textwrap.shorten(text, WIDTH - width, placeholder=' ...')}".rstrip()


def _files(patterns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for pattern in patterns:
        for path in sorted((PROJECT_ROOT / "configs").glob(pattern)):
            yield path.relative_to(PROJECT_ROOT).as_posix(), header(path.read_text(encoding="utf-8"))


def header(text: str) -> str:
    """The first sentence of a YAML's leading comment."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return _sentence(" ".join(lines))


def _classes(folder: str) -> Iterator[tuple[str, str]]:
    for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and _is_choice(node):
                first = (ast.get_docstring(node) or "").split("\n\n")[0]
                yield f"{module}.{node.name}", _sentence(" ".join(first.split()))


def _is_choice(node: ast.ClassDef) -> bool:
    """Whether a class is something to choose, rather than a contract or a record."""
    named = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    bases = {base.id for base in named if isinstance(base, ast.Name)}
    records = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return not bases & {"Protocol", "ABC", "NamedTuple"} and (
        not records or bool(methods & {"__call__", "rows"})
    )


def _sentence(text: str) -> str:
    return re.split(r"(?<!\bal)\. ", text)[0].rstrip(".")
