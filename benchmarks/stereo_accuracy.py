"""Accuracy of the stereo stage on synthetic clips: depth, camera path and objects from the two videos alone.

python benchmarks/stereo_accuracy.py [--clips=48] [--first=1000] [--size=512] [--frames=16] [--seed=2026]
    [--baseline=0.063] [--masks=truth|none] [--jpeg=QUALITY] [--middlebury=FOLDER]

Per clip: median relative depth error over valid pixels and its sign (bias), the same beyond 6 m, the largest camera
centre error relative to the path's length, the error of object displacements (per object and frame pair, centroids of
the points seen at both ends, against the exact scene), and seconds. Then medians, and per relation the share of answers
that agree with the exact scene's: the same class, or a distance within 10 cm or 10 %, whichever is more. Last, the
questions that curation would ask of the reconstructed clips, and the share of their letters that the exact scene gives
too. Poses are compared in the frame of the first camera, without any alignment or scaling. `--jpeg` compresses every
frame first, as lossy video does.

`--middlebury` adds a second table, of photographs: scenes in the form of the Middlebury 2014 data set, a folder each
with im0.png, im1.png, disp0.pfm and calib.txt (vision.middlebury.edu/stereo/data/scenes2014, or disp0GT.pfm as in
MiddEval3). Larger ones are reduced to 800 pixels in width, a whole number of times. `--clips=0` prints it alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from data_prep.questions.options import LETTERS
from data_prep.questions.propose import Question, QuestionRules, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.scenes import relations
from data_prep.scenes.objects import Caption
from data_prep.scenes.scene import Scene
from data_prep.stereo.disparity import StereoError, match_pair
from data_prep.stereo.stage import Reconstruction, reconstruct_clip
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import SyntheticClip, make_clip
from data_prep.synthetic.worlds import SyntheticConfig

FAR = 6.0  # metres
PHOTO_WIDTH = 800  # pixels: about what clips have
MIN_PATH = 0.05  # metres: a shorter path has no relative error


def reconstruct_synthetic(clip: SyntheticClip, use_masks: bool = True) -> Reconstruction:
    """The stage on a synthetic clip: frames, field of view, baseline and (if wanted) masks; no pose, no depth.

    Raises:
      StereoError: as `reconstruct_clip`.
    """
    truth = clip.scene
    objects = truth.objects if use_masks else ()
    return reconstruct_clip(
        clip.left,
        clip.right,
        clip_id=truth.clip_id,
        source_id=truth.source_id,
        timestamps=truth.timestamps,
        intrinsics=truth.intrinsics[0],
        baseline=clip.baseline,
        masks={o.object_id: o.masks for o in objects},
        captions={o.object_id: Caption(o.description, o.category) for o in objects},
    )


def compress(frames: np.ndarray, quality: int) -> np.ndarray:
    """u8[T,H,W,3] after JPEG of that quality (0 to 100)."""
    coded = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in frames[..., ::-1]]
    return np.stack([cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1] for code in coded])


def depth_errors(found: np.ndarray, true: np.ndarray) -> tuple[float, float, float, float]:
    """Median |relative error|, median signed one, share of valid pixels, and the median error beyond FAR (NaN: none).

    Args:
      found: f32[T,H,W] metres, NaN = unknown.
      true: f32[T,H,W] metres.
    """
    valid = np.isfinite(found)
    relative = found[valid] / true[valid] - 1
    far = relative[true[valid] > FAR]
    beyond = float(np.median(np.abs(far))) if far.size > 1000 else np.nan
    return float(np.median(np.abs(relative))), float(np.median(relative)), float(valid.mean()), beyond


def path_error(found: Scene, true: Scene) -> tuple[float, float]:
    """Largest camera centre error and the true path's length, metres, both in the first camera's frame."""
    first = true.world_to_camera[0]
    centers = true.camera_centers @ first[:, :3].T + first[:, 3]
    length = np.linalg.norm(np.diff(centers, axis=0), axis=1).sum()
    return float(np.linalg.norm(found.camera_centers - centers, axis=1).max()), float(length)


def frame_pairs(frames: int) -> list[tuple[int, int]]:
    """Six pairs of four frames spread over the clip."""
    chosen = np.unique(np.linspace(0, frames - 1, 4).astype(int)).tolist()
    return list(itertools.combinations(chosen, 2))


def object_errors(found: Scene, true: Scene) -> list[tuple[float, float]]:
    """Metres between displacement vectors, per object and frame pair that both scenes can answer.

    First against the centroid of the exact scene's own points, of which there are others than were followed (on a
    turning object another displacement); then like with like: against the exact rigid motion of the points followed.
    """
    turn, shift = true.world_to_camera[0, :, :3], true.world_to_camera[0, :, 3]  # the found world is the first camera
    errors = []
    for o in found.objects:
        exact = true.object(o.object_id).points @ turn.T + shift
        for i, j in frame_pairs(true.num_frames):
            ours, theirs = _both(o.points, i, j), _both(exact, i, j)
            if ours is None or theirs is None:
                continue
            moved = (ours[1] - ours[0]).mean(0)
            rotation, centre, target = rigid_motion(*theirs)
            same = ((ours[0] - centre) @ rotation.T + target - ours[0]).mean(0)
            other = (theirs[1] - theirs[0]).mean(0)
            errors.append((float(np.linalg.norm(moved - other)), float(np.linalg.norm(moved - same))))
    return errors


def rigid_motion(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotation f64[3,3] and the two centroids of the least-squares rigid motion between f64[N,3] points (Kabsch)."""
    centre, target = first.mean(0), second.mean(0)
    u, _, vt = np.linalg.svd((first - centre).T @ (second - target))
    sign = np.diag([1, 1, np.sign(np.linalg.det(vt.T @ u.T))])
    return vt.T @ sign @ u.T, centre, target


def _both(points: np.ndarray, i: int, j: int, min_points: int = 5) -> tuple[np.ndarray, np.ndarray] | None:
    """f64[N,3] twice: the points seen in both frames, there and then; None if they are too few."""
    both = np.isfinite(points[i, :, 0]) & np.isfinite(points[j, :, 0])
    return (points[i, both], points[j, both]) if both.sum() >= min_points else None


def compare_relations(found: Scene, true: Scene, tally: dict[str, list[tuple[bool, float]]]) -> None:
    """Adds (agrees, |difference| of scalar values) per relation, where both scenes have an answer.

    Where the found scene refuses, no question would be asked; where the exact one does, the truth is a borderline case.
    """
    for i, j in frame_pairs(true.num_frames):
        cases = [(name, None, None) for name in SCENARIOS if name.startswith("camera")]
        for o in found.objects:
            cases += [(name, o, true.object(o.object_id)) for name in SCENARIOS if name.startswith("object")]
        for name, ours, exact in cases:
            try:
                a, b = relations.solve(name, found, ours, i, j), relations.solve(name, true, exact, i, j)
            except relations.Refused:
                continue
            difference = abs(a.value - b.value) if isinstance(a.value, float) else np.nan
            distance = a.name.endswith("absolute_distance")
            agrees = difference <= max(0.1, 0.1 * b.value) if distance else a.label == b.label
            tally[a.name].append((agrees, difference))


def compare_letters(found: Scene, true: Scene, letters: dict[str, list[bool]]) -> None:
    """Adds per scenario whether the letter of each question about `found` is the exact scene's letter too.

    A question that the exact scene cannot answer (the object hidden there) counts as wrong.
    """
    rules = QuestionRules()
    for question in propose(found, rules, seed=0):
        letters[question.scenario].append(letter_from(true, question, rules) == question.answer)


def letter_from(scene: Scene, question: Question, rules: QuestionRules) -> str | None:
    """Answer a question again from another scene of the same clip: from exact truth where it was asked of an estimate.

    `propose` asks only where its own scene is clear. The other scene has to answer whatever it says, so here nothing is
    refused for being near a threshold: a label is the class the measurement falls into, a distance the nearest option.

    Args:
      scene: of the same frames and with the same object ids as the one that was asked about.
      question: as `propose` made it from the other scene.
      rules: those it was made with.

    Returns:
      The letter; None if the object is not there or not seen enough at the two frames, the true label is not among the
      options, or two options are equally near.
    """
    name, pair = question.scenario, [np.array([frame]) for frame in question.source]
    try:
        obj = scene.object(question.object_id) if question.object_id else None
    except SceneError:
        return None
    values = (
        relations.measure_camera(scene, *pair) if obj is None else relations.measure_object(scene, obj, *pair, rules)[1]
    )[name]
    if np.isnan(values).any():
        return None
    if relations.LABELS[name]:
        lenient = dataclasses.replace(rules, min_motion=0.0, dominance=1.0, margin=0.0)
        label = relations.LABELS[name][relations.classes_of(name, values, lenient)[0]]
        return LETTERS[question.options.index(label)] if label in question.options else None
    gaps = np.abs(np.array([float(text) for text in question.options]) - values[0])
    best = int(gaps.argmin())
    return None if (gaps == gaps[best]).sum() > 1 else LETTERS[best]


def print_letters(letters: dict[str, list[bool]]) -> None:
    """The table of letters per scenario, and over all questions."""
    print("\nquestions asked of the reconstruction           letters as from exact truth")
    for name in SCENARIOS:
        if letters[name]:
            print(f"{name:38s} {len(letters[name]):6d} {100 * np.mean(letters[name]):20.1f} %")
    everything = [same for name in SCENARIOS for same in letters[name]]
    if everything:
        print(f"{'all':38s} {len(everything):6d} {100 * np.mean(everything):20.1f} %")


def read_pfm(path: Path) -> np.ndarray:
    """Read a grey PFM file, f32[H,W], top row first.

    Raises:
      ValueError: not a grey PFM, or shorter than its header says; naming the file.
    """
    with path.open("rb") as file:
        kind, size, scale = (file.readline().split() for _ in range(3))
        values = file.read()
    if kind != [b"Pf"] or len(size) != 2 or len(scale) != 1:
        raise ValueError(f"{path} is no grey PFM file: its header is {kind} {size} {scale}")
    width, height = map(int, size)
    if len(values) != 4 * width * height:
        raise ValueError(f"{path} has {len(values)} bytes of pixels, {width} x {height} need {4 * width * height}")
    kind = "<f4" if float(scale[0]) < 0 else ">f4"  # the sign of the scale is the order of bytes
    return np.frombuffer(values, kind).reshape(height, width)[::-1].astype(np.float32)


def photo_scene(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Views u8[H,W,3] RGB, true disparity f32[H,W] (NaN = unknown) and the largest disparity of a scene folder.

    Raises:
      ValueError: a file is missing or not what it should be; naming it.
    """
    views = [cv2.imread(str(folder / name), cv2.IMREAD_COLOR) for name in ("im0.png", "im1.png")]
    truths = [path for path in (folder / "disp0.pfm", folder / "disp0GT.pfm") if path.exists()]
    if any(view is None for view in views) or not truths or not (folder / "calib.txt").exists():
        raise ValueError(f"{folder} needs im0.png, im1.png, calib.txt and disp0.pfm or disp0GT.pfm")
    card = dict(line.split("=", 1) for line in (folder / "calib.txt").read_text().split("\n") if "=" in line)
    truth, times = read_pfm(truths[0]), math.ceil(views[0].shape[1] / PHOTO_WIDTH)
    height, width = (side // times for side in truth.shape)
    truth = truth[times // 2 :: times, times // 2 :: times][:height, :width] / times  # the middle of each block
    truth = np.where(np.isfinite(truth) & (truth > 0), truth, np.nan)
    whole = [view[: height * times, : width * times] for view in views]
    views = [cv2.resize(view, (width, height), interpolation=cv2.INTER_AREA)[..., ::-1] for view in whole]
    largest = int(card["ndisp"]) / times if "ndisp" in card else float(np.nanmax(truth)) + 2
    return views[0].copy(), views[1].copy(), truth.astype(np.float32), min(math.ceil(largest), width - 1)


def print_photos(root: Path) -> None:
    """Print the table of photographs: over pixels with truth (hidden ones too), and over those that got a disparity."""
    scenes = sorted(path.parent for path in root.glob("*/im0.png"))
    if not scenes:
        print(f"\nno photographs: {root} holds no */im0.png (see --help)")
        return
    print("\nphotographs                 density %  median px  bad-1 %  bad-2 %  seconds")
    for scene in scenes:
        left, right, truth, largest = photo_scene(scene)
        start = time.perf_counter()
        found, valid, _ = match_pair(left, right, largest)
        seconds = time.perf_counter() - start
        known = np.isfinite(truth)
        error = np.abs(found - truth)[known & valid]
        print(
            f"{scene.name[:26]:26s} {100 * error.size / known.sum():10.1f} {np.median(error):10.3f} "
            f"{100 * (error > 1).mean():8.2f} {100 * (error > 2).mean():8.2f} {seconds:8.1f}",
            flush=True,
        )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("clips", 48), ("first", 1000), ("size", 512), ("frames", 16), ("seed", 2026)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--baseline", type=float, default=0.063)
    parser.add_argument("--masks", choices=("truth", "none"), default="truth")
    parser.add_argument("--jpeg", type=int, default=None)
    parser.add_argument("--middlebury", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.clips:
        measure_renders(arguments)
    if arguments.middlebury is not None:
        print_photos(arguments.middlebury)


def measure_renders(arguments: argparse.Namespace) -> None:
    """Prints a line per rendered clip and the summary."""
    size, rig = arguments.size, {"stereo": True, "baseline": arguments.baseline}
    config = SyntheticConfig(height=size, width=size, frames=arguments.frames, **rig)
    rows, objects, failed, tally, letters = [], [], [], defaultdict(list), defaultdict(list)
    print("clip   depth %  bias %  >6 m %  valid %   path m  path err %  object cm  keyframes  seconds")
    for index in range(arguments.first, arguments.first + arguments.clips):
        clip = make_clip(arguments.seed, index, config)
        if arguments.jpeg is not None:
            views = {side: compress(getattr(clip, side), arguments.jpeg) for side in ("left", "right")}
            clip = dataclasses.replace(clip, **views)
        start = time.perf_counter()
        try:
            result = reconstruct_synthetic(clip, arguments.masks == "truth")
        except StereoError as error:
            failed.append(f"{index}: {error.reason}: {error}")
            print(f"{index:5d}  {error.reason}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        depth, bias, valid, far = depth_errors(result.depths, clip.depth)
        error, length = path_error(result.scene, clip.scene)
        relative = error / length if length >= MIN_PATH else np.nan
        here = object_errors(result.scene, clip.scene)
        compare_relations(result.scene, clip.scene, tally)
        compare_letters(result.scene, clip.scene, letters)
        objects += here
        rows.append((depth, bias, far, valid, error, relative, seconds))
        moved = 100 * np.median([e for e, _ in here]) if here else np.nan
        print(
            f"{index:5d}  {100 * depth:7.2f} {100 * bias:7.2f} {100 * far:7.2f} {100 * valid:8.1f} {length:8.3f} "
            f"{100 * relative:11.2f} {moved:10.2f} {result.quality.keyframes:10d} "
            f"{seconds:8.1f}",
            flush=True,
        )
    summarise(np.array(rows).reshape(-1, 7), objects, failed, tally)
    print_letters(letters)


def summarise(rows: np.ndarray, objects: list[tuple[float, float]], failed: list[str], tally: dict) -> None:
    """Prints medians over clips, their worst, and label agreement per relation."""
    print(f"\n{len(rows)} clips reconstructed, {len(failed)} rejected")
    if not len(rows):
        return
    depth, bias, far, valid, error, relative, seconds = rows.T
    print(f"relative depth error: median {100 * np.median(depth):.2f} %, worst clip {100 * depth.max():.2f} %")
    print(f"  bias {100 * np.median(bias):+.2f} %; beyond {FAR:g} m {100 * np.nanmedian(far):.2f} %", end="; ")
    print(f"valid pixels {100 * np.median(valid):.1f} %")
    share = np.mean(relative[np.isfinite(relative)] <= 0.02)
    print(
        f"trajectory error: median {100 * np.nanmedian(relative):.2f} % of the path ({1000 * np.median(error):.1f} mm)"
    )
    print(f"  worst clip {100 * np.nanmax(relative):.2f} %; {100 * share:.0f} % of clips within 2 %")
    for name, errors in zip(("", ", same points"), np.array(objects).reshape(-1, 2).T, strict=True):
        if errors.size:
            print(f"object displacement error{name}: median {100 * np.median(errors):.2f} cm", end=", ")
            print(f"90th percentile {100 * np.percentile(errors, 90):.1f} cm over {len(errors)} pairs")
    print(f"seconds per clip: median {np.median(seconds):.1f}\n")
    print("relation                                cases      agrees  median |difference|")
    for name, cases in sorted(tally.items()):
        same, difference = np.array(cases, float).T
        metres = f"{np.median(difference):.3f} m" if np.isfinite(difference).any() else "-"
        print(f"{name:38s} {len(cases):6d} {100 * same.mean():10.1f} % {metres:>16s}")


if __name__ == "__main__":
    main()
