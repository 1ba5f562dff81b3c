"""Parameters that exist only where others have given values: `conditions:` of a sweep.

    conditions:
      model.attack.num_steps: {model.attack: [EmbeddingPGD]}

Elsewhere such a parameter is neither drawn nor set. Where it names several others, all of them have to hold.
Weights & Biases' format cannot say this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.config.errors import ConfigError, suggest
from experiments.studies.reading import known


@dataclass(frozen=True)
class Condition:
    """When one parameter exists.

    Args:
        needs: another parameter -> the values, as JSON texts, of which it has to have one.
    """

    needs: Mapping[str, Sequence[str]]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial's values fulfil it; a parameter that does not exist has none of its values."""
        return all(
            key in values and json.dumps(values[key]) in allowed for key, allowed in self.needs.items()
        )

    def text(self) -> str:
        """As a reader sees it."""
        return " and ".join(f"{key} is {' or '.join(allowed)}" for key, allowed in self.needs.items())


def conditions_of(node: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Condition]:
    """Read `conditions:` beside the parameters that they speak of. Raises: ConfigError naming the field."""
    found = {}
    for key, needs in node.items():
        place = f"conditions.{key}"
        known(key, parameters, place)
        if not isinstance(needs, Mapping) or not needs:
            raise ConfigError(f"{place}: expected another parameter with its values, got {needs!r:.60}")
        found[key] = Condition(
            {other: _allowed(other, own, parameters, f"{place}.{other}") for other, own in needs.items()}
        )
    return found


def in_order(keys: Sequence[str], conditions: Mapping[str, Condition]) -> list[str]:
    """The parameters, each behind those that decide whether it exists. Raises: ConfigError for a circle."""
    given: dict[str, None] = {}

    def give(key: str, behind: tuple[str, ...]) -> None:
        if key in behind:
            raise ConfigError(f"conditions.{key}: depends on itself, through {', '.join(behind[1:]) or key}")
        for other in conditions[key].needs if key in conditions else ():
            give(other, (*behind, key))
        given[key] = None

    for key in keys:
        give(key, ())
    return [*given]


def _allowed(other: str, values: Any, parameters: Mapping[str, Any], place: str) -> list[str]:
    known(other, parameters, place)
    own = parameters[other]
    if "values" not in own and "value" not in own:
        raise ConfigError(f"{place}: expected a parameter with `values`, that one is a range")
    there = [json.dumps(value) for value in own.get("values", [own.get("value")])]
    texts = [json.dumps(value) for value in (values if isinstance(values, list) else [values])]
    for text in texts or [""]:
        if text not in there:
            raise ConfigError(
                f"{place}: expected some of {', '.join(there)}, got {text or 'none'}{suggest(text, there)}"
            )
    return texts
