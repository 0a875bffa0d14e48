"""Source `describe` of the `curate` task: has a vision language model name what moves in clips, and describe objects.

Two passes, with a segmenter between them, which is not part of this project:

1. a clip without masks gets `<clip>-entities.json`, the noun phrases to prompt the segmenter with;
2. a clip with masks (`<clip>-masks.npz` or `.json`) and without captions gets `<clip>-captions.json`, one fine-grained
   description per object.

Files are written beside the videos, whole or not at all, and never written over. Replies are cached by the content of
the request, so a run that was killed asks for nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import ml_collections
import numpy as np
from tqdm import tqdm

from data_prep.scenes.objects import read_masks
from data_prep.sources.frames import encode_jpeg, read_all_frames
from data_prep.store.untrusted import SceneError
from data_prep.teacher.client import ChatRequest, ReplyError, Teacher, TeacherError, user_message
from data_prep.teacher.config import open_teacher
from data_prep.teacher.entities import entity_request, parse_entities
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.qa.errors import MediaError

CAPTION_SCHEMA = {
    "type": "object",
    "required": ["caption", "category"],
    "properties": {
        "caption": {"type": "string", "minLength": 3, "maxLength": 120},
        "category": {"type": "string", "minLength": 1, "maxLength": 50},
    },
}
_PROMPT = """The pictures show one object of a video, outlined in green: first the whole frame, then the object cut out.
Describe the outlined object so that somebody who watches the video finds it at once and mixes it up with nothing else.
Reply with JSON and nothing else, of this form:
{"caption": "the small brown dog with a red collar", "category": "animal"}
The caption is one noun phrase that begins with "the" and tells looks only: kind, colour, size, clothing, parts. Say \
nothing about where it is or how it moves. The category is one broad word."""
_LEFT_ENDINGS = ("-left_rectified", "-left")
_OTHER_EYE = ("-right_rectified", "-right")
_MAX_FRAMES = 1000
_FRAME_PIXELS = 512 * 512


class DescribeError(ValueError):
    """There is nothing to describe."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """A clip with work to do. `masks` is None while it has none."""

    clip_id: str
    video: Path
    masks: Path | None

    @property
    def output(self) -> Path:
        """The file that this pass writes."""
        kind = "entities" if self.masks is None else "captions"
        return self.video.parent / f"{self.clip_id}-{kind}.json"


def find_pending(folder: Path) -> list[Pending]:
    """The clips of a folder whose next file is not there, sorted. Raises DescribeError if it holds no videos."""
    found = []
    videos = [p for p in sorted(folder.glob("*.mp4")) if not p.stem.endswith(_OTHER_EYE)]
    if not videos:
        raise DescribeError(f"input = '{folder}' holds no *.mp4 videos")
    for video in videos:
        ending = next((e for e in _LEFT_ENDINGS if video.stem.endswith(e)), "")
        clip_id = video.stem.removesuffix(ending)
        masks = next((p for p in (folder / f"{clip_id}-masks{s}" for s in (".npz", ".json")) if p.is_file()), None)
        pending = Pending(clip_id, video, masks)
        if not pending.output.exists():
            found.append(pending)
    return found


def describe(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point. A clip that fails is named and left for the next run; the exit code is then 1.

    Raises:
      DescribeError: no videos. TeacherError: no model's name or address, or the endpoint refuses.
    """
    if not config.input:
        raise DescribeError("input is not set: --config.input=DIR with the videos")
    pending = find_pending(Path(config.input))
    teacher = open_teacher(config.teacher, Path(workdir))
    failed = []
    with DecodePool(config.decode_timeout_s) as pool:
        for clip in tqdm(pending, unit="clip"):
            try:
                made = (
                    _entities(clip, teacher, pool, config)
                    if clip.masks is None
                    else _captions(clip, teacher, pool, config)
                )
            except (ReplyError, SceneError, MediaError) as error:
                failed.append(f"{clip.clip_id}: {error}")
                continue
            write_atomic(clip.output, json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    print(f"{len(pending) - len(failed)} files written to {config.input}, {len(failed)} clips failed")
    for line in failed:
        print(f"  {line}")
    return 1 if failed else 0


def _entities(
    clip: Pending, teacher: Teacher, pool: DecodePool, config: ml_collections.ConfigDict
) -> dict[str, list[dict[str, str]]]:
    resize = ResizeRule("per_frame", 2, 2, 4, _FRAME_PIXELS)
    seen = pool.read(str(clip.video), SampleRule("uniform", config.teacher.num_frames, None), resize)
    request = entity_request(config.teacher.model, [encode_jpeg(frame) for frame in seen.frames])
    return {"entities": [dataclasses.asdict(e) for e in parse_entities(teacher.ask(request))]}


def _captions(
    clip: Pending, teacher: Teacher, pool: DecodePool, config: ml_collections.ConfigDict
) -> dict[str, dict[str, str]]:
    frames = read_all_frames(clip.video, pool, _MAX_FRAMES).frames
    masks = read_masks(clip.masks, len(frames), frames.shape[1:3])
    names = [name for name, mask in masks.items() if mask.any()]
    requests = [caption_request(config.teacher.model, frames, masks[name]) for name in names]
    replies = teacher.ask_many(requests)
    captions = {}
    for name, reply in zip(names, replies, strict=True):
        if isinstance(reply, TeacherError):
            raise reply
        captions[name] = {key: " ".join(reply[key].split()) for key in ("caption", "category")}
    for name in sorted(set(masks) - set(names)):  # never in view: nobody asks about it, but its masks need a caption
        captions[name] = {"caption": name, "category": ""}
    return captions


def caption_request(model: str, frames: np.ndarray, mask: np.ndarray) -> ChatRequest:
    """The request to describe one object, shown in the frame in which it is largest.

    Args:
      frames: u8[T,H,W,3] RGB.
      mask: bool[T,H,W] of the object, not empty.
    """
    at = int(mask.sum((1, 2)).argmax())
    frame, outline = frames[at].copy(), mask[at].astype(np.uint8)
    contours, _ = cv2.findContours(outline, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(frame, contours, -1, (0, 255, 0), max(1, round(min(frame.shape[:2]) / 256)))
    rows, columns = np.flatnonzero(outline.any(1)), np.flatnonzero(outline.any(0))
    margin = max(8, round(0.15 * max(np.ptp(rows), np.ptp(columns))))
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    cut = frames[at][top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]
    message = user_message(_PROMPT, [encode_jpeg(frame), encode_jpeg(cut)])
    return ChatRequest(model, (message,), CAPTION_SCHEMA, temperature=0.0, max_tokens=256)
