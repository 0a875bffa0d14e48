"""The scenarios of questions, and settings that are given scenario by scenario."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from data_prep.scenes.relations import LABELS

SCENARIOS = tuple(LABELS)


class KindError(ValueError):
    """Settings of scenarios are not given as `scenario_numbers` reads them."""


def kind_weights(kinds: Sequence[str]) -> dict[str, float]:
    """Read the scenarios to ask about, each "name" or "name=weight"; none at all: all of them, equally often.

    Raises:
      KindError: as `scenario_numbers`, which reads weights above 0 and up to 1000.
    """
    return scenario_numbers("kinds", kinds, "weight", (0, 1000), 1.0) or dict.fromkeys(SCENARIOS, 1.0)


def spacings(entries: Sequence[str]) -> dict[str, float]:
    """Read ratios of neighbouring options, each "name=ratio", of scenarios that ask for a distance.

    Raises:
      KindError: as `scenario_numbers`, which reads ratios above 1.1 and up to 4; a scenario without distances.
    """
    found = scenario_numbers("spacing", entries, "ratio", (1.1, 4))
    for name in found:
        if LABELS[name]:
            raise KindError(f"questions.spacing: '{name}' has no distances for options")
    return found


def scenario_numbers(
    key: str, entries: Sequence[str], what: str, bounds: tuple[float, float], default: float | None = None
) -> dict[str, float]:
    """Read numbers of scenarios, each "name=number", or "name" for the default if there is one.

    Args:
      key, what: of the group `questions`, and what its numbers are, for messages.
      bounds: numbers lie above the first and not above the second.

    Raises:
      KindError: an unknown scenario (names the nearest), one given twice, a number out of its bounds.
    """
    numbers: dict[str, float] = {}
    for entry in entries:
        name, equals, text = entry.partition("=") if isinstance(entry, str) else (str(entry), "", "")
        if name not in LABELS:
            hint = "".join(f" - did you mean '{close}'?" for close in difflib.get_close_matches(name, SCENARIOS, 1))
            raise KindError(f"questions.{key} has no scenario '{name}'{hint} (there are: {', '.join(SCENARIOS)})")
        try:
            number = float(text) if equals or default is None else default
        except ValueError:
            number = math.nan
        if name in numbers or not bounds[0] < number <= bounds[1]:
            needs = f"needs a {what} above {bounds[0]:g} and up to {bounds[1]:g}, not '{text}'"
            raise KindError(f"questions.{key}: '{name}' {'is there twice' if name in numbers else needs}")
        numbers[name] = number
    return numbers
