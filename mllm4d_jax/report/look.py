"""The page of a few answers about one clip: the frames that the model saw, and each answer taken apart beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm4d_jax.qa.answers import extract_answer
from mllm4d_jax.qa.reasoning import parse, unread
from mllm4d_jax.qa.rewards import Solution
from mllm4d_jax.report import page, summary
from mllm4d_jax.report.browser import MAP_NOTE, PICTURE_BYTES, SIDE_NOTE, BrowserOptions, browser, overview, spread
from mllm4d_jax.report.items import MAX_PARTS, MAX_STATES, TONES, Centers, ShownAnswer
from mllm4d_jax.report.page import Column, Markup, Section, join, shortened, table, tag

_MOST_FRAMES = 128
_PICTURE = 40_000  # bytes of one, at most


def film(frames: Sequence[tuple[np.ndarray, str]]) -> tuple[Markup, str]:
    """Return frames with what stands below each, and a line that says how many of them are shown.

    Args:
      frames: (u8[H, W, 3] RGB, caption) pairs in order; of many, some are shown, evenly spaced.
    """
    shown = [frames[n] for n in spread(len(frames), _MOST_FRAMES)]
    size = min(_PICTURE, PICTURE_BYTES // max(len(shown), 1))
    figures = [
        tag("figure", page.image(page.thumbnail(pixels, max_bytes=size), caption), tag("figcaption", caption))
        for pixels, caption in shown
    ]
    sizes = dict.fromkeys(f"{pixels.shape[1]} x {pixels.shape[0]}" for pixels, _ in frames)
    count = f"All {len(frames)}" if len(shown) == len(frames) else f"{len(shown)} of {len(frames)}, evenly spaced:"
    note = f"{count} frames as the model saw them ({', '.join(sizes)} pixels), with the times at which they show."
    return tag("div", *figures, class_="film"), note


def shown_answer(
    title: str,
    question: str,
    choices: Mapping[str, str],
    response: str,
    *,
    reasoning: bool,
    truth: Sequence[str] = (),
    solution: Solution | None = None,
    facts: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> ShownAnswer:
    """Return an answer taken apart, with what of it is not read among its facts.

    Args:
      title: of its card.
      question: without options; `choices`: letter -> option, {} for a free answer.
      response: what the model said.
      reasoning: thinking and centres were asked for.
      truth: letters of the right options, or a text; () where it is not known.
      solution: true centres; None where they are not known.
      facts: (name, value) pairs about the answer.
      notes: what is to be said besides.
    """
    parsed, notes = parse(response), [*notes, *unread(response, reasoning=reasoning)]
    pairs = (("camera", parsed.camera_centers, solution and solution.camera_center),)
    pairs += (("object", parsed.object_centers, solution and solution.object_center),)
    answer, read_by = parsed.answer or "", []
    if choices:
        found = extract_answer(response, choices)
        answer = found.letter or ""
        notes += [] if answer else ["no option can be read from it"]
        notes += ["it gives another option besides"] if found.conflict else []
        read_by = [("read by the rule", found.rule)] if answer else []
    judged = truth and (choices or solution)
    outcome = "not judged" if answer else "unparsed" if choices else "not judged"
    if judged:
        outcome = ("correct" if answer in truth else "wrong") if answer else "unparsed"
    for kind, written, known in pairs:
        if known and written and len(written) != len(known):
            notes.append(f"{kind} centres written: {len(written)}; the question has {len(known)} states")
    camera, objects = (Centers(tuple(known or ())[:MAX_STATES], written[:MAX_STATES]) for _, written, known in pairs)
    return ShownAnswer(
        title=title,
        question=question,
        media=(),
        choices=dict(list(choices.items())[:MAX_PARTS]),
        response=response,
        outcome=outcome,
        answer=answer,
        truth=tuple(truth),
        facts=(*facts, *read_by, *(("not read", note) for note in notes)),
        facets={"outcome": outcome},
        camera=camera,
        objects=objects,
    )


def look_page(
    title: str,
    clip: tuple[Markup, str],
    answers: Sequence[ShownAnswer],
    facts: Mapping[str, str],
    config: Mapping[str, Any],
) -> str:
    """Return the whole page.

    Args:
      title: its heading.
      clip: what `film` made of the clip.
      answers: in the order of the questions.
      facts: about model and clip, name -> text.
      config: of the run, flat.
    """
    pictures, note = clip
    drawn = any(c.truth or c.predicted for one in answers for c in (one.camera, one.objects))
    about = [[name, shortened(value, summary.FIELD)] for name, value in facts.items()]
    said = browser([{"": one} for one in answers], BrowserOptions(frames=0, side=True), label="answers")
    tiles = [("questions", f"{len(answers)}")]
    tiles += [("answers", overview(answers))] if any(TONES[one.outcome] for one in answers) else []
    sections = [
        Section("clip", "Clip", pictures, note),
        Section("answers", "Answers", said, f"{MAP_NOTE} {SIDE_NOTE}" if drawn else ""),
        Section("about", "About", join([table([Column("what"), Column("value")], about, caption="Model and clip")])),
        Section("config", "Configuration", summary.config_table(config)),
    ]
    return page.page(title, sections, tiles=tiles)
