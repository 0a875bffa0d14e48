"""The 4D metadata of one clip: camera poses, object points over time, and where they came from.

Conventions of everything in `data_prep`: metres, seconds, OpenCV camera axes (x right, y down, z forward), pixel
centres at +0.5. A pose is [R|t]; `world_to_camera` maps x_camera = R x_world + t, `camera_to_world` is its inverse.
Both are stored by name, so that no formula has to guess which one it was given.

On disk a scene is `scene.npz` (arrays, readable without pickle) and `scene.json` (everything else and the digest of the
npz). The JSON is written last: a folder with a JSON that fits its npz is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.store.untrusted import (
    MAX_NPZ_BYTES,
    SceneError,
    as_scene_error,
    npz_bytes,
    read_bytes,
    read_json,
    read_npz,
)
from mllm4d_jax.files.atomic import write_atomic, write_json

# How far the metres can be trusted: measured with a known baseline; with an assumed one (Stereo4D's 63 mm); not at all.
SCALES = ("metric", "assumed_baseline", "relative")
FORMAT_VERSION = 1
_POSE_TOLERANCE = 1e-6
_ARRAYS = {"world_to_camera": (3, 4), "camera_to_world": (3, 4), "intrinsics": (3, 3), "timestamps": ()}  # per frame
_TEXTS = ("object_id", "description", "category")  # of an object


@dataclasses.dataclass(frozen=True, eq=False)
class SceneObject:
    """One object followed through the clip.

    Attributes:
      object_id: unique in the scene.
      description: fine-grained noun phrase ("the red wooden box"), '' if unknown.
      category: broad class ("box"), '' if unknown.
      points: f64[T, M, 3] world frame, metres; the same M points in every frame; a row of NaN = not seen in that frame.
      masks: bool[T, H, W], True where the object shows, or None.
    """

    object_id: str
    description: str
    category: str
    points: np.ndarray
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check types and shapes, and freeze the arrays. Raises SceneError: naming the object and the field."""
        where = f"object {self.object_id!r}"
        _check_name(self.object_id, "object_id")
        for field in _TEXTS[1:]:
            if not isinstance(getattr(self, field), str):
                raise SceneError(f"{where}: {field} must be a string, not {getattr(self, field)!r}")
        points = _frozen(self.points, np.float64, f"{where}: points")
        if points.ndim != 3 or points.shape[2] != 3:
            raise SceneError(f"{where}: points must be [T, M, 3], not {list(points.shape)}")
        if np.isinf(points).any():
            raise SceneError(f"{where}: points hold infinite values; an unseen point is NaN")
        x, y, z = np.moveaxis(np.isnan(points), -1, 0)
        if ((x != y) | (y != z)).any():
            raise SceneError(f"{where}: a point has some NaN coordinates; an unseen point has all three NaN")
        object.__setattr__(self, "points", points)
        if self.masks is not None:
            masks = np.asarray(self.masks)
            if masks.dtype != np.bool_ or masks.ndim != 3 or masks.shape[0] != points.shape[0]:
                raise SceneError(f"{where}: masks are {masks.dtype}{list(masks.shape)}, not bool[{len(points)}, H, W]")
            object.__setattr__(self, "masks", _frozen(masks, np.bool_, f"{where}: masks"))

    def seen(self) -> np.ndarray:
        """Return bool[T, M]: whether each point is seen in each frame."""
        return ~np.isnan(self.points[..., 0])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """The 4D metadata of one clip. Of the two directions of its poses one may be left out: it is the other's inverse.

    Attributes:
      clip_id: unique in the data set.
      source_id: the source video; training and benchmark data are split by it.
      world_to_camera: f64[T, 3, 4].
      camera_to_world: f64[T, 3, 4], the inverse.
      intrinsics: f64[T, 3, 3] pixels of `image_size`.
      image_size: (height, width) pixels.
      timestamps: f64[T] seconds at which the frames of its video show, strictly increasing.
      objects: with distinct ids.
      scale: one of `SCALES`.
      provenance: JSON-able; tool, files, parameters, quality figures.
    """

    clip_id: str
    source_id: str
    world_to_camera: np.ndarray = None
    camera_to_world: np.ndarray = None
    intrinsics: np.ndarray
    image_size: tuple[int, int]
    timestamps: np.ndarray
    objects: tuple[SceneObject, ...]
    scale: str
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check everything and freeze the arrays. Raises SceneError: naming the field."""
        _check_name(self.clip_id, "clip_id")
        _check_name(self.source_id, "source_id")
        if self.scale not in SCALES:
            raise SceneError(f"scale is {self.scale!r}; it must be one of {', '.join(SCALES)}")
        self._check_arrays()
        self._check_objects()
        with as_scene_error(TypeError, ValueError, RecursionError, name="provenance cannot be written as JSON"):
            provenance = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
        object.__setattr__(self, "provenance", provenance)

    @property
    def num_frames(self) -> int:
        """Return T."""
        return self.world_to_camera.shape[0]

    @property
    def camera_centers(self) -> np.ndarray:
        """Return f64[T, 3] camera centres in the world, metres."""
        return self.camera_to_world[:, :, 3]

    def object(self, object_id: str) -> SceneObject:
        """Return the object of that id. Raises SceneError: there is none."""
        known = {o.object_id: o for o in self.objects}
        if object_id not in known:
            raise SceneError(f"clip {self.clip_id}: no object {object_id!r}; it has {[*known]}")
        return known[object_id]

    def _check_arrays(self) -> None:
        for name, other in (("world_to_camera", "camera_to_world"), ("camera_to_world", "world_to_camera")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, invert_poses(getattr(self, other)))
        for name in _ARRAYS:
            array = _frozen(getattr(self, name), np.float64, name)
            if not np.isfinite(array).all():
                raise SceneError(f"{name} holds NaN or infinite values")
            object.__setattr__(self, name, array)
        count = len(self.timestamps) if self.timestamps.ndim == 1 else 0
        if not count or (np.diff(self.timestamps) <= 0).any():
            raise SceneError("timestamps must be [T], T at least 1, in seconds and strictly increasing")
        for name, shape in _ARRAYS.items():
            if getattr(self, name).shape != (count, *shape):
                raise SceneError(f"{name} must be {[count, *shape]}, not {list(getattr(self, name).shape)}")
        size = tuple(self.image_size)
        if len(size) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in size):
            raise SceneError(f"image_size must be (height, width) in pixels, not {self.image_size!r}")
        object.__setattr__(self, "image_size", (int(size[0]), int(size[1])))
        k = self.intrinsics
        if (k[:, 0, 0] <= 0).any() or (k[:, 1, 1] <= 0).any() or (k[:, 1, 0] != 0).any():
            raise SceneError("intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx and fy above 0")
        if (k[:, 2] != (0, 0, 1)).any():
            raise SceneError("the last row of the intrinsics must be 0, 0, 1")
        difference = np.abs(invert_poses(self.world_to_camera) - self.camera_to_world)
        room = _POSE_TOLERANCE * (1 + np.abs(self.camera_to_world).max())
        if difference.max() > room:
            frame = int(difference.max((1, 2)).argmax())
            raise SceneError(
                f"world_to_camera and camera_to_world are not inverse to each other: frame {frame} is off by "
                f"{difference.max():.3g}"
            )

    def _check_objects(self) -> None:
        object.__setattr__(self, "objects", tuple(self.objects))
        ids = [o.object_id for o in self.objects]
        if len(set(ids)) != len(ids):
            raise SceneError(f"object ids must be distinct, not {ids}")
        for o in self.objects:
            if len(o.points) != self.num_frames:
                raise SceneError(f"object {o.object_id!r} has {len(o.points)} frames, the clip {self.num_frames}")
            if o.masks is not None and o.masks.shape[1:] != self.image_size:
                raise SceneError(f"object {o.object_id!r}: masks of {list(o.masks.shape[1:])}, not {self.image_size}")


def intrinsics_of(image_size: tuple[int, int], fov: float) -> np.ndarray:
    """Return f64[3, 3] of a (height, width) image with square pixels, central principal point, `fov` degrees across.

    Raises:
      SceneError: the field of view is not within (0, 180).
    """
    if not 0 < fov < 180:
        raise SceneError(f"a field of view of {fov} degrees; it must be within (0, 180)")
    height, width = image_size
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def invert_poses(poses: np.ndarray) -> np.ndarray:
    """Invert rigid motions: f64[..., 3, 4] -> f64[..., 3, 4], [R|t] -> [R'|-R't].

    Raises:
      SceneError: wrong shape, or R is no rotation to 1e-6 (`nearest_rigid` repairs rounded estimates).
    """
    poses = _pose_array(poses)
    rotation = poses[..., :3]
    worst = np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max(initial=0.0)
    if not worst <= _POSE_TOLERANCE or (np.linalg.det(rotation) < 0).any():
        raise SceneError(f"a pose holds no rotation: R R' differs from the identity by {worst:.3g}, or R is a mirror")
    inverse = rotation.swapaxes(-1, -2)
    return np.concatenate([inverse, -inverse @ poses[..., 3:]], axis=-1)


def move_points(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a pose f64[3, 4] to points f64[..., 3]: R p + t."""
    return points @ pose[:, :3].T + pose[:, 3]


def move_tracks(poses: np.ndarray, tracks: np.ndarray) -> np.ndarray:
    """Apply the pose of each frame, f64[T, 3, 4], to the points of tracks, f64[N, T, 3]."""
    return np.einsum("tij,ntj->nti", poses[:, :, :3], tracks) + poses[:, :, 3]


def nearest_rigid(poses: np.ndarray, tolerance: float = 1e-3) -> np.ndarray:
    """Replace R of poses f64[..., 3, 4] by the nearest rotation (polar factor), for files that store few digits.

    Raises:
      SceneError: wrong shape, not finite, or some entry of R would change by more than `tolerance`.
    """
    poses = _pose_array(poses)
    if not np.isfinite(poses).all():
        raise SceneError("poses hold NaN or infinite values")
    u, _, vt = np.linalg.svd(poses[..., :3])
    rotation = u @ vt
    change = np.abs(rotation - poses[..., :3]).max(initial=0.0)
    if change > tolerance or (np.linalg.det(rotation) < 0).any():
        raise SceneError(f"a pose is no rigid motion: its 3x3 part is {change:.3g} from a rotation, or a mirror")
    return np.concatenate([rotation, poses[..., 3:]], axis=-1)


def save_scene(scene: Scene, folder: str | Path) -> None:
    """Write `scene.npz` and `scene.json` into `folder` (created if absent), each under another name first.

    The bytes depend on the scene alone (and on the zlib in use), not on the time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(scene, name) for name in _ARRAYS}
    for n, o in enumerate(scene.objects):
        arrays[f"points_{n}"] = o.points
        if o.masks is not None:
            arrays[f"masks_{n}"] = np.packbits(o.masks, axis=None)
    data = npz_bytes(arrays)
    document = {
        "format": "mllm4d_jax.scene",
        "version": FORMAT_VERSION,
        "npz_sha256": hashlib.sha256(data).hexdigest(),
        "clip_id": scene.clip_id,
        "source_id": scene.source_id,
        "image_size": list(scene.image_size),
        "scale": scene.scale,
        "objects": [{n: getattr(o, n) for n in _TEXTS} | {"masks": o.masks is not None} for o in scene.objects],
        "provenance": scene.provenance,
    }
    write_atomic(folder / "scene.npz", data)
    write_json(folder / "scene.json", document)


def load_scene(folder: str | Path) -> Scene:
    """Read the scene that `save_scene` wrote; everything is checked anew.

    Raises:
      SceneError: a file is missing, damaged, too large, of another version, or does not belong to the other.
    """
    folder = Path(folder)
    path = folder / "scene.json"
    try:
        document = read_json(path)
        if document.get("format") != "mllm4d_jax.scene":
            raise SceneError(f"{path}: not a scene file")
        if document.get("version") != FORMAT_VERSION:
            raise SceneError(f"{path}: version {document.get('version')!r}; this program reads {FORMAT_VERSION}")
        data = read_bytes(folder / "scene.npz", MAX_NPZ_BYTES)
        if hashlib.sha256(data).hexdigest() != document["npz_sha256"]:
            raise SceneError(f"{path}: scene.npz beside it is another one or damaged; write the scene again")
        arrays = read_npz(data, str(folder / "scene.npz"))
        named = {name: arrays[name] for name in _ARRAYS}
        size = tuple(document["image_size"])
        objects = tuple(_load_object(n, entry, arrays, size) for n, entry in enumerate(document["objects"]))
        texts = {name: document[name] for name in ("clip_id", "source_id", "scale", "provenance")}
        return Scene(**named, **texts, image_size=size, objects=objects)
    except SceneError as error:
        raise error if str(folder) in str(error) else SceneError(f"{folder}: {error}") from error
    except KeyError as error:
        raise SceneError(f"{folder}: the scene lacks {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SceneError(f"{path}: damaged: {error}") from error


def _load_object(n: int, entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray], size: tuple) -> SceneObject:
    masks = None
    points = arrays[f"points_{n}"]
    if entry["masks"]:
        count = len(points) * size[0] * size[1]
        packed = arrays[f"masks_{n}"]
        if packed.dtype != np.uint8 or packed.shape != ((count + 7) // 8,):
            raise SceneError(f"masks_{n} does not hold {len(points)} masks of {size[0]}x{size[1]}")
        masks = np.unpackbits(packed, count=count).astype(bool).reshape(len(points), *size)
    return SceneObject(**{name: entry[name] for name in _TEXTS}, points=points, masks=masks)


def _pose_array(poses: np.ndarray) -> np.ndarray:
    poses = np.asarray(poses, np.float64)
    if poses.shape[-2:] != (3, 4):
        raise SceneError(f"poses must be [..., 3, 4], not {list(poses.shape)}")
    return poses


def _frozen(array: np.ndarray, dtype: type, name: str) -> np.ndarray:
    """Return a copy that nobody can write to; an array that is such already is taken as it is (masks are large)."""
    frozen = isinstance(array, np.ndarray) and not array.flags.writeable
    if frozen and array.dtype == dtype and array.flags.c_contiguous:
        return array
    with as_scene_error(TypeError, ValueError, name=f"{name} is no array of numbers"):
        array = np.array(array, dtype, order="C")
    array.setflags(write=False)
    return array


def _check_name(value: str, field: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise SceneError(f"{field} must be a string with something in it, not {value!r}")
