"""`thundercat schema`: a JSON schema of configuration files, so that an editor completes and checks them.

It is made from the constructors' annotations, as the command line's own checks are. A file may hold a part of
a configuration, so nothing is required; `${...}` may stand for any value.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from lightning import Trainer

from datamodules.evaluation import SUBJECTS, EvaluationSets
from datamodules.fields import options
from experiments.config.check import Seed, parameters_of
from experiments.config.classes import project_classes
from experiments.config.help import documentation
from experiments.config.trainer_fields import TRAINER_FIELDS

Schema = dict[str, Any]
INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{"}
NODE: Schema = {"$ref": "#/$defs/class"}
BOUNDS = {
    Ge: ("minimum", "ge"),
    Gt: ("exclusiveMinimum", "gt"),
    Le: ("maximum", "le"),
    Lt: ("exclusiveMaximum", "lt"),
}
SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    type(None): "null",
}


def schema_text() -> str:
    """The schema as JSON text."""
    return json.dumps(schema())


def schema() -> Schema:
    """The schema of a configuration file, or of a fragment."""
    classes = {path: cls for path in project_classes().values() if (cls := _class(path)) is not None}
    definitions = {path: _fields(cls, {}) for path, cls in classes.items()}
    cases = [
        {
            "if": {"properties": {"class_path": {"const": path}}, "required": ["class_path"]},
            "then": {"properties": {"init_args": {"$ref": f"#/$defs/{path}"}}},
        }
        for path in classes
    ]
    include = {"description": "YAML files to build on, merged before this one"}
    node = {
        "type": "object",
        "properties": {
            "class_path": {"anyOf": [{"enum": list(classes)}, {"type": "string"}]},
            "init_args": {"type": "object"},
            "include": include,
            "vars": {"type": "object"},
        },
        "additionalProperties": False,
        "allOf": cases,
    }
    top = {
        "include": include,
        "vars": {"type": "object", "description": "values for ${vars.NAME}"},
        "seed_everything": _value(Seed),
        "trainer": _fields(Trainer, TRAINER_FIELDS),
        "model": NODE,
        "data": NODE,
        "ckpt_path": {"type": ["string", "null"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Thundercat configuration",
        "if": {"anyOf": [{"required": ["class_path"]}, {"required": ["init_args"]}]},
        "then": NODE,
        "else": {
            # What a run is judged on may be a file of its own (configs/data/sets).
            "if": {"anyOf": [{"required": [name]} for name in (*SUBJECTS, "blocks")]},
            "then": _fields(EvaluationSets, {}, {"vars": top["vars"]}),
            "else": {"type": "object", "properties": top, "additionalProperties": False},
        },
        "$defs": {"class": node, **definitions},
    }


def _class(path: str) -> type | None:
    """A class that can be named in a configuration; None for protocols and abstract classes."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name, None)
    usable = inspect.isclass(cls) and not inspect.isabstract(cls) and not getattr(cls, "_is_protocol", False)
    return cls if usable else None


def _fields(cls: type, fields: Mapping[str, Any], beside: Mapping[str, Schema] | None = None) -> Schema:
    """The schema of a constructor's arguments; `fields` are annotations that say more than its own, `beside`
    is what may stand beside them."""
    try:
        hints = {**typing.get_type_hints(cls.__init__, include_extras=True), **fields}  # type: ignore[misc]
        parameters = parameters_of(cls)
    except (NameError, ValueError, TypeError):  # built on something that says nothing of its arguments
        return {"type": "object"}
    texts = documentation(cls)
    properties: Schema = {"include": {}}
    appended = {}
    for name in parameters:
        properties[name] = {
            **_value(hints.get(name, Any)),
            "description": " ".join(texts.get(name, "").split()),
        }
        appended[f"{name}+"] = {"type": "array"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    properties |= appended | dict(beside or {})
    return {"type": "object", "properties": properties, "additionalProperties": open_ended}


def _value(hint: Any) -> Schema:
    found = [_option(option) for option in options(hint)]
    return {} if {} in found else {"anyOf": [*found, INTERPOLATION]}


def _option(hint: Any) -> Schema:
    if typing.get_origin(hint) is Annotated:
        base, *marks = typing.get_args(hint)
        bounds = {BOUNDS[type(m)][0]: getattr(m, BOUNDS[type(m)][1]) for m in marks if type(m) in BOUNDS}
        return _option(base) | bounds
    if hint in SCALARS:
        return {"type": SCALARS[hint]}
    origin, items = typing.get_origin(hint), [i for i in typing.get_args(hint) if i is not Ellipsis]
    if origin is Literal:
        return {"enum": list(items)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _value(items[-1])}
    if isinstance(origin, type) and not issubclass(origin, type) and items:
        return {"type": "array", "items": _value(items[-1])}
    if isinstance(hint, type) and hint is not Any and dataclasses.is_dataclass(hint):
        return _fields(hint, {})
    if isinstance(hint, type) and hint is not Any and hint.__module__ not in ("datetime", "pathlib"):
        return NODE
    return {}
