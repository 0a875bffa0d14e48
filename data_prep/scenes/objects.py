"""Objects of a scene from other tools' files: masks, captions, 2D tracks; and the scene points that lie in the masks.

Formats: COCO run lengths (github.com/cocodataset/cocoapi, own decoder), npz masks, SA-V (see `masklets`),
`{track_id: caption}` JSON, BootsTAP tracks (`tracks` [N, T, 2] pixels x y, `visibles` [N, T]).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.scenes.masklets import ClipMasks, is_sav, sav_masks
from data_prep.scenes.scene import Scene, SceneObject, move_tracks
from data_prep.store.untrusted import SceneError, keep_visible, numbers, read_json, read_npz
from mllm4d_jax.files.quoting import shown

MAX_MASK_BYTES = 2**31  # all masks of a clip together, one byte a pixel
MAX_CAPTION = 1000  # characters of what a file calls an object
MAX_SIDE = 1 << 14
_BLOCK = 1024  # tracks projected at once
_RLE_TEXT = re.compile(r"[0-o]*")  # characters 48 to 111


@dataclasses.dataclass(frozen=True)
class Caption:
    """What an object is called: fine-grained `description`, broad `category` ('' if unknown)."""

    description: str
    category: str = ""


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask bool[H, W] as COCO run lengths: {"size": [H, W], "counts": list}, column-major, zeros first."""
    flat = np.concatenate([[False], np.asarray(mask, bool).T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": counts.tolist()}


def decode_rle(rle: Any, where: str = "RLE", image_size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode COCO run lengths to bool[H, W]; `counts` as a list or as a compressed string.

    Args:
      where: what errors call it.
      image_size: the (H, W) it must have; None takes any up to 16384 a side. Checked before anything is allocated.

    Raises:
      SceneError: not an RLE, another size, or runs that do not add up to the size.
    """
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise SceneError(f'{where}: expected {{"size": [h, w], "counts": ...}}, got {shown(rle)}')
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(_is_int(n) and 0 < n <= MAX_SIDE for n in size):
        raise SceneError(f"{where}: size must be [height, width] within {MAX_SIDE}, not {shown(size)}")
    if image_size is not None and tuple(size) != tuple(image_size):
        raise SceneError(f"{where}: size is {list(size)}, the images are {list(image_size)}")
    pixels = size[0] * size[1]
    if isinstance(counts, str):
        counts = _decompress(counts, pixels, where)
    if not isinstance(counts, list) or not all(_is_int(n) and 0 <= n <= pixels for n in counts):
        raise SceneError(f"{where}: counts must be a string or a list of whole numbers of at most {pixels}")
    if sum(counts) != pixels:
        raise SceneError(f"{where}: the runs cover {sum(counts)} pixels of {pixels}")
    values = np.zeros(len(counts), bool)
    values[1::2] = True
    return np.ascontiguousarray(np.repeat(values, counts).reshape(size[1], size[0]).T)


def _decompress(text: str, pixels: int, where: str) -> list[int]:
    """Run lengths of a compressed string: groups of 5 bits, lowest first, sign-extended; from the third run on
    (counting from 0) as the difference to the run two before."""
    if not _RLE_TEXT.fullmatch(text):
        raise SceneError(f"{where}: the compressed counts hold a character outside '0' to 'o'")
    counts: list[int] = []
    value = shift = 0
    if len(text) > 20 * (pixels + 1):
        raise SceneError(f"{where}: {len(text)} characters of counts for {pixels} pixels")
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 40:
            raise SceneError(f"{where}: the compressed counts hold a number of more than 40 bits")
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if not 0 <= counts[-1] <= pixels:
            raise SceneError(f"{where}: run {len(counts) - 1} is {counts[-1]} long, in an image of {pixels} pixels")
        value = shift = 0
    if shift:
        raise SceneError(f"{where}: the compressed counts end in the middle of a number")
    return counts


def read_masks(path: str | Path, frames: int, image_size: tuple[int, int]) -> ClipMasks:
    """Read the masks per object id, bool[frames, H, W], of an npz or a JSON file.

    npz: one bool[T, H, W] array per id. JSON: {id: [RLE or null per frame]}; null = not in that frame. Or an annotation
    of SA-V, of every fourth frame: the others are not `annotated`.

    Raises:
      SceneError: unreadable, or masks of another length or size than the clip; naming file and id.
    """
    path = Path(path)
    per_object = frames * image_size[0] * image_size[1]
    if path.suffix == ".npz":
        masks = read_npz(path, max_bytes=MAX_MASK_BYTES)
        for name, array in masks.items():
            if array.dtype != np.bool_ or array.shape != (frames, *image_size):
                raise SceneError(
                    f"{path}: {name} is {array.dtype}{list(array.shape)}, the clip needs bool{[frames, *image_size]}"
                )
            array.setflags(write=False)  # scenes take it as it is
        return ClipMasks(masks, np.ones(frames, bool))
    document, annotated = read_json(path), np.ones(frames, bool)
    if is_sav(document):
        document, annotated = sav_masks(document, path, frames)
    if len(document) * per_object > MAX_MASK_BYTES:
        raise SceneError(f"{path}: {len(document)} objects of {per_object} mask pixels exceed {MAX_MASK_BYTES} bytes")
    masks = {}
    for name, entries in document.items():
        if not isinstance(entries, list) or len(entries) != frames:
            raise SceneError(f"{path}: {name!r} must list one RLE or null for each of {frames} frames")
        masks[name] = np.zeros((frames, *image_size), bool)
        for t, entry in enumerate(entries):
            if entry is not None:
                masks[name][t] = decode_rle(entry, f"{path}: {name!r}, frame {t}", image_size)
        masks[name].setflags(write=False)
    return ClipMasks(masks, annotated)


def read_captions(path: str | Path) -> dict[str, Caption]:
    """Read captions per object id: {id: "text"} or {id: {"caption": "text", "category": "text"}}.

    Raises:
      SceneError: naming file and id.
    """
    captions = {}
    for name, entry in read_json(Path(path)).items():
        fields = entry if isinstance(entry, dict) else {"caption": entry}
        texts = (fields.get("caption"), fields.get("category", ""))
        if any(isinstance(said, str) and len(said) > MAX_CAPTION for said in (name, *texts)):
            raise SceneError(f"{path}: {shown(name)} has a name or caption of more than {MAX_CAPTION} characters")
        if not all(isinstance(text, str) for text in texts) or not texts[0].strip():
            raise SceneError(
                f'{path}: {name!r} must be a caption or {{"caption": ..., "category": ...}}, not {shown(entry)}'
            )
        captions[name] = Caption(texts[0].strip(), texts[1].strip())
    return captions


def read_bootstap(path: str | Path, frames: int) -> np.ndarray:
    """Read the 2D tracks f64[N, frames, 2] of a BootsTAP npz: pixels (x, y), NaN = not visible.

    Raises:
      SceneError: a key is missing or has another shape or type; naming file and key.
    """
    arrays = read_npz(path)
    tracks = numbers(path, arrays, "tracks", (None, frames, 2), finite=False)
    visible = numbers(path, arrays, "visibles", tracks.shape[:2], kinds="bfiu")
    if not np.isin(visible, (0, 1)).all():
        raise SceneError(f"{path}: visibles must be bool, or 0 and 1")
    return keep_visible(path, "tracks", tracks, visible > 0)


def lift_tracks(
    tracks: np.ndarray, depth: np.ndarray, intrinsics: np.ndarray, camera_to_world: np.ndarray
) -> np.ndarray:
    """Place 2D tracks f64[N, T, 2] in the world, f64[N, T, 3], by the depth of their pixel; NaN where it has none.

    Args:
      depth: f32[T, H, W] camera z, metres, NaN = unknown.
      intrinsics: f64[T, 3, 3]. camera_to_world: f64[T, 3, 4].
    """
    count, frames = tracks.shape[:2]
    height, width = depth.shape[1:]
    inside = (tracks >= 0).all(2) & (tracks[..., 0] < width) & (tracks[..., 1] < height)  # False for NaN
    pixel = np.where(inside[..., None], tracks, 0).astype(np.int64)
    at = (np.broadcast_to(np.arange(frames), (count, frames)), pixel[..., 1], pixel[..., 0])
    z = np.where(inside, depth[at].astype(np.float64), np.nan)
    rays = np.concatenate([tracks, np.ones((count, frames, 1))], axis=2)
    points = move_tracks(camera_to_world, np.einsum("tij,ntj->nti", np.linalg.inv(intrinsics), rays) * z[..., None])
    points[np.isnan(points).any(2)] = np.nan
    return points


def project(points: np.ndarray, world_to_camera: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project world points f64[N, T, 3]: pixels f64[N, T, 2] (x, y; centres at +0.5) and camera z f64[N, T].

    Positions are NaN for unseen points and for points at or behind the camera.
    """
    local = move_tracks(world_to_camera, points)
    z = local[..., 2]
    flat = np.einsum("tij,ntj->nti", intrinsics, local)[..., :2]
    ahead = z > 0  # False for NaN
    pixels = np.full(flat.shape, np.nan)
    np.divide(flat, z[..., None], out=pixels, where=ahead[..., None])
    return pixels, z


def objects_from_tracks(
    scene: Scene,
    tracks: np.ndarray,
    masks: Mapping[str, np.ndarray],
    captions: Mapping[str, Caption],
    *,
    min_points: int = 4,
    min_frames: int = 2,
    min_share: float = 0.5,
    annotated: np.ndarray | None = None,
) -> tuple[tuple[SceneObject, ...], dict[str, str]]:
    """Make the objects whose masks hold enough tracked points (paper: points that project into the mask).

    A track belongs to an object if it lies in the object's mask in at least `min_share` of the frames in which it is
    visible; in the others it is taken as not seen (it slid onto something else). A track that two masks claim goes to
    the one that holds it more often. A frame with fewer than `min_points` points has none: a centroid of one or two
    points says little about an object.

    Args:
      tracks: f64[N, T, 3] world, NaN = not visible.
      masks: bool[T, H, W] per object id. captions: per object id.
      min_frames: frames with points that an object needs.
      annotated: bool[T], frames whose masks are known; in others no track is anybody's. None = all.

    Returns:
      (objects in the order of `masks`, object id -> reason of those left out).

    Raises:
      SceneError: tracks or masks do not fit the scene, or a mask has no caption.
    """
    height, width = scene.image_size
    if tracks.ndim != 3 or tracks.shape[1:] != (scene.num_frames, 3):
        raise SceneError(f"tracks are {list(tracks.shape)}, the clip needs [N, {scene.num_frames}, 3]")
    for name, mask in masks.items():
        if mask.dtype != np.bool_ or mask.shape != (scene.num_frames, height, width):
            raise SceneError(f"masks of {name!r} are {mask.dtype}{list(mask.shape)}, which does not fit the clip")
        if name not in captions:
            raise SceneError(f"no caption for the masks {name!r}; captions are for {sorted(captions)[:20]}")
    visible = ~np.isnan(tracks[..., 0])
    if annotated is not None:
        visible &= annotated
    hits = _mask_hits(scene, tracks, visible, list(masks.values()))
    share = hits.sum(2) / np.maximum(visible.sum(1), 1)  # f64[objects, N]
    owner = np.where(share.max(0, initial=0) >= min_share, share.argmax(0), -1) if len(masks) else None
    objects, dropped = [], unmasked(masks, captions)
    for n, (name, mask) in enumerate(masks.items()):
        members = np.flatnonzero(owner == n)
        seen = hits[n][members]
        seen &= seen.sum(0) >= min_points
        members, seen = members[seen.any(1)], seen[seen.any(1)]
        if seen.any(0).sum() < min_frames:
            reason = "never in view" if not mask.any() else "too few points" if len(members) else "no tracked points"
            dropped[name] = f"{reason}: {int(seen.any(0).sum())} of at least {min_frames} frames"
            continue
        points = np.full((scene.num_frames, len(members), 3), np.nan)
        member, frame = np.nonzero(seen)
        points[frame, member] = tracks[members[member], frame]
        points.setflags(write=False)  # the object takes it as it is
        objects.append(SceneObject(name, captions[name].description, captions[name].category, points, mask))
    return tuple(objects), dropped


def unmasked(masks: Collection[str], captions: Collection[str]) -> dict[str, str]:
    """Return, per object id that has a caption and no masks, why it is left out."""
    return {name: "it has a caption and no masks" for name in captions if name not in masks}


def _mask_hits(scene: Scene, tracks: np.ndarray, visible: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Say which points of tracks f64[N, T, 3] lie in which mask bool[T, H, W]: bool[masks, N, T].

    Only what is visible (bool[N, T]) is projected, a block of tracks at a time: a third of a released clip's points,
    and never more than a small part of them in memory.
    """
    height, width = scene.image_size
    hits = np.zeros((len(masks), *visible.shape), bool)
    for start in range(0, len(tracks), _BLOCK):
        frame, track = np.nonzero(visible[start : start + _BLOCK].T)  # frame by frame: a mask's pixels lie together
        track += start
        # One point a frame: a track of as many frames as there are points.
        poses, cameras = scene.world_to_camera[frame], scene.intrinsics[frame]
        pixels = project(tracks[track, frame][None], poses, cameras)[0][0]
        inside = (pixels >= 0).all(1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)  # False for NaN
        track, frame = track[inside], frame[inside]
        column, row = pixels[inside].astype(np.int64).T
        at = np.ravel_multi_index((frame, row, column), (scene.num_frames, height, width))
        for n, mask in enumerate(masks):
            held = mask.reshape(-1)[at]
            hits[n, track[held], frame[held]] = True
    return hits


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
