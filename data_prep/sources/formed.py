"""Clips of another source and, beside each of them, the same clip in other forms: more to learn from one recording."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_prep.scenes.forms import FORMS, form_id, frames_in_form, scene_in_form
from data_prep.sources.base import ClipSource, LoadedClip
from data_prep.sources.frames import read_all_frames, write_video, written_times
from data_prep.store.parts import clip_file_name
from mllm4d_jax.files.atomic import replacing
from mllm4d_jax.media.decode_pool import DecodePool

_MAX_FRAMES = 10_000


@dataclasses.dataclass(frozen=True, eq=False)
class FormedSource:
    """The clips of `source`, then each of them in every one of `forms` (names of `FORMS`).

    Attributes:
      source: loads the clips as they are. One that keeps its scenes finds a clip's geometry only once.
      forms: names of `FORMS`.
      root: of all videos; those of the clips as they are get copied into it.
      pool: decodes what is written in another form.
    """

    source: ClipSource
    forms: Sequence[str]
    root: Path
    pool: DecodePool

    def clip_ids(self) -> list[str]:
        plain = self.source.clip_ids()
        return plain + [form_id(clip_id, form) for form in self.forms for clip_id in plain]

    def load(self, clip_id: str) -> LoadedClip:
        plain, _, form = clip_id.rpartition("@")
        if form not in FORMS:
            plain, form = clip_id, ""
        clip = self.source.load(plain)
        video = self.root / f"{clip_file_name(clip_id)}{'.mp4' if form else clip.video.suffix}"
        self.root.mkdir(parents=True, exist_ok=True)
        if not form:
            with replacing(video, video.suffix) as partial:
                shutil.copyfile(clip.video, partial)
            return dataclasses.replace(clip, video=video)
        scene, frames = scene_in_form(clip.scene, form), read_all_frames(clip.video, self.pool, _MAX_FRAMES).frames
        scene = dataclasses.replace(scene, timestamps=written_times(scene.timestamps))
        write_video(video, frames_in_form(frames, form), scene.timestamps, "mpeg4")
        return LoadedClip(scene, video)
