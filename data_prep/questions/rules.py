"""Reads from a config what is asked about clips."""

from __future__ import annotations

import ml_collections

from data_prep.questions.propose import QuestionRules
from data_prep.questions.scenarios import KindError, kind_weights, spacings


def question_rules(config: ml_collections.ConfigDict) -> QuestionRules:
    """Return what is asked, by the config's `questions`. Raises KindError; a margin not below tau is one too."""
    values = dict(config.questions)
    if values["margin"] >= values["tau"]:
        raise KindError(
            f"questions.margin = {values['margin']:g} must be below questions.tau = {values['tau']:g}, or nothing is "
            "'not moving'"
        )
    chosen = {"weights": kind_weights(values.pop("kinds")), "spacing": spacings(values.pop("spacing"))}
    return QuestionRules(**chosen, **values)
