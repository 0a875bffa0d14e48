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
from collections.abc import Sequence
from pathlib import Path

import cv2
import ml_collections
import numpy as np
from tqdm import tqdm

from data_prep.scenes.objects import read_masks
from data_prep.sources.base import CAPTIONS, MASKS, card_of
from data_prep.sources.frames import encode_jpeg, read_all_frames
from data_prep.sources.layout import LEFT, LEFT_EYE, RIGHT, RIGHT_EYE, VIDEOS, clip_groups, find, walk
from data_prep.sources.stereo import PAIR
from data_prep.stereo.disparity import StereoError, split_side_by_side
from data_prep.store.parts import ClipRejected
from data_prep.store.untrusted import SceneError
from data_prep.teacher.client import ChatRequest, ReplyError, Teacher, open_teacher, user_message
from data_prep.teacher.endpoint import TeacherError
from data_prep.teacher.json_schema import exact_object, text_schema
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.qa.errors import MediaError

MAX_ENTITIES = 20
ENTITY_SCHEMA = exact_object(
    entities={
        "type": "array",
        "maxItems": MAX_ENTITIES,
        "items": exact_object(en=text_schema(100), cat=text_schema(50)),
    }
)
CAPTION_SCHEMA = exact_object(caption=text_schema(120, shortest=3), category=text_schema(50))
_ENTITY_PROMPT = f"""These are {{count}} frames of one video, in order of time.
List the active entities: people, animals, vehicles and things that move by themselves or are moved by someone at some \
point. Leave out whatever only seems to move because the camera does, and anything too small or blurred to be outlined.
Reply with JSON and nothing else, of this form:
{{{{"entities": [{{{{"en": "short English noun phrase that fits no other entity", "cat": "broad category"}}}}]}}}}
Name each entity once, the most prominent first, {MAX_ENTITIES} at most. If nothing moves, the list is empty."""
_CAPTION_PROMPT = """\
The pictures show one object of a video, outlined in green: first the whole frame, then the object cut out.
Describe the outlined object so that somebody who watches the video finds it at once and mixes it up with nothing else.
Reply with JSON and nothing else, of this form:
{"caption": "the small brown dog with a red collar", "category": "animal"}
The caption is one noun phrase that begins with "the" and tells looks only: kind, colour, size, clothing, parts. Say \
nothing about where it is or how it moves. The category is one broad word."""
_CLIP_FILES = ((".npz",), MASKS, CAPTIONS, ("-clip.json",))  # known by the clip's name, not by an eye's
_MAX_FRAMES = 1000
_FRAME_PIXELS = 512 * 512


class DescribeError(ValueError):
    """There is nothing to describe."""


@dataclasses.dataclass(frozen=True)
class PendingClip:
    """A clip with work to do.

    Attributes:
      clip_id, video: of the clip.
      masks: None while it has none.
      layout: how both views are packed into the video; "pair" where it shows one.
      mask_size: (height, width) of the masks where that is not the video's own: of an external tool's frames.
    """

    clip_id: str
    video: Path
    masks: Path | None
    layout: str = PAIR
    mask_size: tuple[int, int] | None = None

    @property
    def output(self) -> Path:
        """The file that this pass writes."""
        kind = "entities" if self.masks is None else "captions"
        return self.video.parent / f"{self.clip_id}-{kind}.json"


def find_pending(folder: Path, layout: str = PAIR) -> list[PendingClip]:
    """Return the clips below a folder whose next file is not there, sorted by their videos.

    Args:
      layout: `stereo.layout`: "pair" where videos show one view each.

    Raises:
      DescribeError: there are no videos, a clip has two mask files, or a card is damaged.
    """
    videos = [folder / inner / name for inner, names in walk(folder) for name in names if name.endswith(VIDEOS)]
    if not videos:
        raise DescribeError(f"input = '{folder}' holds no videos ({', '.join(VIDEOS[:2])})")
    groups, found = clip_groups(folder, VIDEOS), []
    try:
        for video in videos:
            clip_id = _clip_of(video, folder, groups) if layout == PAIR else video.stem
            if clip_id is None:
                continue
            masks = find(folder, clip_id, [MASKS], groups, optional=True)
            size = card_of(folder, clip_id, groups).frame_size
            pending = PendingClip(clip_id, video, masks[0] if masks else None, layout, size)
            if not pending.output.exists():
                found.append(pending)
    except ClipRejected as error:
        raise DescribeError(error.detail) from error
    except SceneError as error:
        raise DescribeError(str(error)) from error
    return found


def _clip_of(video: Path, folder: Path, groups: Sequence[str]) -> str | None:
    """The clip that a video shows, None for a right eye's: what shows an eye has the other beside it, or other files.

    "turn_left.mp4" alone is a clip of that name; "a-left_rectified.mp4" is nobody's own name.
    """
    for mine, other in ((LEFT_EYE, RIGHT), (RIGHT_EYE, LEFT)):
        ending = next((e for e in mine if video.stem.endswith(e)), "")
        if ending:
            stem = video.stem.removesuffix(ending)
            if ending.endswith("_rectified") or find(folder, stem, [other, *_CLIP_FILES], groups, optional=True):
                return stem if mine is LEFT_EYE else None
    return video.stem


def describe(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Write the next file of every clip. A clip that fails is named and left for the next run; the exit code is then 1.

    Raises:
      DescribeError: no videos. TeacherError: no model's name or address, or the endpoint refuses.
    """
    if not config.input:
        raise DescribeError("input is not set: --config.input=DIR with the videos")
    pending = find_pending(Path(config.input), config.stereo.layout)
    teacher = open_teacher(config.teacher, Path(workdir))
    failed = []
    with DecodePool(config.decode_timeout_s) as pool:
        for clip in tqdm(pending, unit="clip"):
            try:
                made = (_entities if clip.masks is None else _captions)(clip, teacher, pool, config.teacher)
            except (ReplyError, SceneError, StereoError, MediaError) as error:
                failed.append(f"{clip.clip_id}: {error}")
                continue
            write_json(clip.output, made)
    print(f"{len(pending) - len(failed)} files written to {config.input}, {len(failed)} clips failed")
    for line in failed:
        print(f"  {line}")
    return 1 if failed else 0


def _entities(clip: PendingClip, teacher: Teacher, pool: DecodePool, settings: ml_collections.ConfigDict) -> dict:
    resize = ResizeRule("per_frame", 2, 2, 4, _FRAME_PIXELS if clip.layout == PAIR else 2 * _FRAME_PIXELS)
    seen = pool.read(str(clip.video), SampleRule("uniform", settings.num_frames, None), resize)
    request = entity_request(settings.model, [encode_jpeg(frame) for frame in _left_view(seen.frames, clip.layout)])
    return {"entities": parse_entities(teacher.ask(request))}


def _left_view(frames: np.ndarray, layout: str) -> np.ndarray:
    """The left view of frames u8[T,H,W,3]; masks are of it. Raises StereoError: they cannot be halved."""
    return frames if layout == PAIR else split_side_by_side(frames, layout)[0]


def entity_request(model: str, frames: Sequence[bytes]) -> ChatRequest:
    """Return the request to name what moves. `frames`: JPEG files in order of time."""
    message = user_message(_ENTITY_PROMPT.format(count=len(frames)), frames)
    return ChatRequest(model, (message,), ENTITY_SCHEMA, max_tokens=1024)


def parse_entities(reply: dict) -> list[dict[str, str]]:
    """Return the entities of a reply that fits `ENTITY_SCHEMA`: white space tidied, blank and repeated names dropped.

    "en" is a noun phrase to detect the entity by, "cat" a broad category ("person", "vehicle").
    """
    entities: dict[str, dict[str, str]] = {}
    for entry in reply["entities"]:
        name, category = _tidy(entry["en"]), _tidy(entry["cat"]).lower()
        if name and category:
            entities.setdefault(name.casefold(), {"en": name, "cat": category})
    return list(entities.values())


def _captions(clip: PendingClip, teacher: Teacher, pool: DecodePool, settings: ml_collections.ConfigDict) -> dict:
    """Return {object id: {"caption", "category"}} of a clip's masks."""
    frames = _left_view(read_all_frames(clip.video, pool, _MAX_FRAMES).frames, clip.layout)
    if clip.mask_size:
        height, width = clip.mask_size
        frames = np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in frames])
    masks = read_masks(clip.masks, len(frames), frames.shape[1:3])
    names = [name for name, mask in masks.items() if mask.any()]
    captions = {}
    replies = teacher.ask_many([caption_request(settings.model, frames, masks[name]) for name in names])
    for name, reply in zip(names, replies, strict=True):
        if isinstance(reply, TeacherError):
            raise reply
        captions[name] = {key: _tidy(reply[key]) for key in ("caption", "category")}
    for name in sorted(set(masks) - set(names)):  # never in view: nobody asks about it, but its masks need a caption
        captions[name] = {"caption": name, "category": ""}
    return captions


def _tidy(text: str) -> str:
    return " ".join(text.split())


def caption_request(model: str, frames: np.ndarray, mask: np.ndarray) -> ChatRequest:
    """Return the request to describe one object, shown in the frame in which it is largest.

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
    message = user_message(_CAPTION_PROMPT, [encode_jpeg(frame), encode_jpeg(cut)])
    return ChatRequest(model, (message,), CAPTION_SCHEMA, max_tokens=256)
