"""Masks of Segment Anything Video: `<video>_manual.json` or `<video>_auto.json` (github.com/facebookresearch/sam2,
sav_dataset), and what a mask file of any kind leaves unsaid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.store.untrusted import SceneError
from mllm4d_jax.files.quoting import shown

EVERY = 4  # frames: videos have 24 a second, annotations 6


class ClipMasks(dict[str, np.ndarray]):
    """Masks bool[T, H, W] per object id.

    Attributes:
      annotated: bool[T], the frames whose masks are known. In the others nothing is marked, and nothing is known.
    """

    def __init__(self, masks: Mapping[str, np.ndarray], annotated: np.ndarray) -> None:
        super().__init__(masks)
        self.annotated = annotated


def is_sav(document: Mapping[str, Any]) -> bool:
    """Say whether a JSON object is an annotation of SA-V: "masklet" is a list of frames there."""
    return "masklet_id" in document and "masklet" in document


def sav_masks(document: Mapping[str, Any], path: str | Path, frames: int) -> tuple[dict[str, list], np.ndarray]:
    """Bring an annotation of SA-V into the form {id: [RLE or None per frame]}; ids are those of `masklet_id`, as text.

    Annotations are of every frame, or of every fourth from the first on. Nothing is put in between.

    Returns:
      (that, bool[frames]: which frames are annotated).

    Raises:
      SceneError: another form, or a number of annotations that does not fit the clip; naming file and frame.
    """
    ids, listed = document["masklet_id"], document["masklet"]
    if not isinstance(ids, list) or not all(type(n) is int for n in ids) or len(set(ids)) != len(ids):
        raise SceneError(f"{path}: masklet_id must be a list of whole numbers that differ, not {shown(ids)}")
    if not isinstance(listed, list):
        raise SceneError(f"{path}: masklet must be a list of annotated frames, not {shown(listed)}")
    step = next((step for step in (1, EVERY) if len(listed) == -(-frames // step)), None)
    if step is None:
        raise SceneError(
            f"{path}: masklet has {len(listed)} annotated frames; a clip of {frames} frames has {frames}, or "
            f"{-(-frames // EVERY)} if every fourth is annotated (SA-V: 6 of 24 a second); are they of the same video?"
        )
    found: dict[str, list] = {str(n): [None] * frames for n in ids}
    for n, entries in enumerate(listed):
        if not isinstance(entries, list) or len(entries) != len(ids):
            raise SceneError(f"{path}: masklet[{n}] must list one RLE for each of {len(ids)} objects")
        for name, entry in zip(found, entries, strict=True):
            found[name][n * step] = entry
    return found, np.arange(frames) % step == 0
