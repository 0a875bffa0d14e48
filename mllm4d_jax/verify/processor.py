"""Parity of the processor with recorded tables: sampling, sizes, resampling, patches, prompts, index arrays.

Every table says in its own keys what was asked, so tables for other factors, budgets and patch sizes work as well.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mllm4d_jax.encode import grids
from mllm4d_jax.encode.chat import Visual, render_chat, rendered_text, timestamp_text, video_timestamps
from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import patchify
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.media import resize
from mllm4d_jax.media.frame_sampling import sample_indices
from mllm4d_jax.models.rope import frequency_axes
from mllm4d_jax.verify.checks import CaseChecks, Check, Comparison
from mllm4d_jax.verify.recorded import RecordingError, read_json, read_npz

PATCH_TOLERANCE = 1e-6
_NUMBER = re.compile(r"(?:Picture|Video) \d+: (?=<\|vision_start\|>)")
# Pixel statistics by patch size: the releases differ in both together.
_STATISTICS = {
    16: ((0.5,) * 3, (0.5,) * 3),
    14: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_CHANNELS, _TEMPORAL, _MERGE = 3, 2, 2
_REFUSED = {"error": "refused"}
_TABLE_SIDE, _WINDOW = 48, 4  # recorded index arrays are those of the published towers


def is_processor_folder(folder: pathlib.Path) -> bool:
    """Whether the folder holds at least one table that `verify_processor` reads."""
    return any((folder / name).is_file() for name in _TABLES) or any(_pixel_files(folder))


def verify_processor(folder: pathlib.Path, label: str, tolerance: float = PATCH_TOLERANCE) -> Iterable[Check]:
    """Checks every table found in a folder laid out like a recorded `processor/`; missing tables are not an error.

    Raises:
      RecordingError: a table is damaged or incomplete.
    """
    for name, verify in _TABLES.items():
        if (folder / name).is_file():
            found = CaseChecks(f"{label}/{pathlib.Path(name).stem}")
            verify(folder / name, found)
            yield from found.checks()
    for path in _pixel_files(folder):
        found = CaseChecks(f"{label}/{path.stem}")
        _pixels(path, found, tolerance)
        yield from found.checks()


def _pixel_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in sorted(folder.glob("*.npz")) if p.name not in _TABLES]


def _outcome(compute: Callable[[], Any]) -> Any:
    """The value, or {"error": ...}: the tables record a refusal by its exception, whose type is the recorder's own."""
    try:
        value = compute()
    except RecordingError:  # of the table, and no refusal of ours
        raise
    except ValueError:
        return _REFUSED
    return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value


def _recorded(value: Any) -> Any:
    return _REFUSED if isinstance(value, Mapping) and "error" in value else value


def _frame_sampling(path: pathlib.Path, found: CaseChecks) -> None:
    rules = {"qwen3_vl": "qwen3_vl", "qwen2_5_vl_hf": "qwen2_5_vl", "qwen_vl_utils": "qwen_vl_utils"}
    for table, rows in read_json(path).items():
        for row in rows if table in rules else ():
            found.group(table).same(str(row), _sampled(row, rules[table]), _recorded_indices(row))


def _sampled(row: Mapping, rule: str) -> Any:
    """Our indices of a row, as far as the row records them."""
    ask = {**row.get("ele", {}), **{k: row[k] for k in ("fps", "num_frames") if k in row}}
    if rule == "qwen_vl_utils":
        ask = {"num_frames" if k == "nframes" else k: v for k, v in ask.items()}
        if "num_frames" not in ask:
            ask.setdefault("fps", 2.0)
    indices = _outcome(lambda: sample_indices(rule, row["total"], row["video_fps"], **ask))
    if isinstance(indices, Mapping) or "indices" in row:
        return indices
    if "head" not in row:
        return len(indices)
    n = len(row["head"])
    return {"n": len(indices), "head": indices[:n], "tail": indices[-n:], "sum": sum(indices)}


def _recorded_indices(row: Mapping) -> Any:
    """Indices of a row; long lists are recorded as their ends and sum, refusals under either key."""
    if "head" in row:
        return {k: row[k] for k in ("n", "head", "tail", "sum")}
    return _recorded(row["indices"] if "indices" in row else row["nframes"])


def _smart_resize(path: pathlib.Path, found: CaseChecks) -> None:
    def image(r):
        return resize.image_size(r["h"], r["w"], r["factor"], r["min_pixels"], r["max_pixels"])

    def video(r):
        temporal = r["temporal_factor"]
        return resize.video_size(r["t"], r["h"], r["w"], r["factor"], temporal, r["min_pixels"], r["max_pixels"])

    def utils_image(r):
        return resize.utils_image_size(r["h"], r["w"], r["factor"])

    def utils_frame(r):
        low, high = resize.utils_frame_budget(r["t"], r["factor"])
        if (low, high) != (r["min_pixels"], r["max_pixels"]):
            return {"budget": [low, high]}
        return resize.utils_image_size(r["h"], r["w"], r["factor"], low, high)

    def utils_given(r):
        rule = resize.ResizeRule("qwen_vl_utils", r["factor"], _TEMPORAL, r["min_pixels"], r["max_pixels"])
        return rule.size(r["t"], r["h"], r["w"])

    tables = {
        "image": image,
        "video_qwen3_vl": video,
        "image_qwen_vl_utils_default_budget": utils_image,
        "video_frame_qwen_vl_utils_default_budget": utils_frame,
        "video_frame_qwen_vl_utils_given_budget": utils_given,
    }
    for table, rows in read_json(path).items():
        for row in rows if table in tables else ():
            found.group(table).same(str(row), _outcome(functools.partial(tables[table], row)), _recorded(row["out"]))


def _prompts(path: pathlib.Path, found: CaseChecks) -> None:
    recorded = read_json(path)
    for c in recorded["conversations"]:
        if c["add_vision_id"]:  # prompts of ours do not number images and videos; the rest is compared
            c = {k: _NUMBER.sub("", v) if isinstance(v, str) else v for k, v in c.items()}
        options = dict(add_generation_prompt=c["add_generation_prompt"])
        for family in ("qwen3_vl", "qwen2_5_vl"):
            text = rendered_text(render_chat(c["messages"], family, **options))
            found.group("templates").same(f"{c['name']} {family}", text, c[family])
            for form, outer_markers in (("_hf517", True), ("_release", False), ("", False)):
                key = f"{family}_expanded{form}"
                if key in c:
                    visual = dict(visuals=_visuals(c, family), merge_size=_MERGE, outer_markers=outer_markers)
                    text = rendered_text(render_chat(c["messages"], family, **visual, **options))
                    found.group("expanded").same(f"{c['name']} {key}", text, c[key])
        _timestamps(c["name"], c, c.get("video", {}).get("fps"), c.get("sampled_indices"), found)
    for i, row in enumerate(recorded.get("timestamps", ())):
        _timestamps(f"timestamps[{i}]", row, row["video_fps"], row["indices"], found)


def _visuals(c: Mapping, family: str) -> list[Visual]:
    """Grids of a recorded conversation, in the reading order of its parts."""
    queues = {m: iter(c.get(f"{family}_grids", {}).get(f"{m}_grid_thw", ())) for m in ("image", "video")}
    visuals = []
    for message in c["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            if part["type"] in queues:
                grid = Grid(part["type"], *next(queues[part["type"]]))
                times = tuple(c.get("timestamps", ())) if part["type"] == "video" else ()
                visuals.append(Visual(grid, times))
    return visuals


def _timestamps(name: str, row: Mapping, fps: float | None, indices: list[int] | None, found: CaseChecks) -> None:
    if indices is None or "timestamps" not in row:
        return
    ours = video_timestamps(np.array(indices) / fps, _TEMPORAL)
    found.group("timestamps").same(name, list(ours), row["timestamps"])
    if "text" in row:
        found.group("timestamps").same(f"{name} text", [timestamp_text(t) for t in ours], row["text"])


def _mrope_axis(path: pathlib.Path, found: CaseChecks) -> None:
    for r in read_json(path, list):
        for key, interleaved in (("interleaved", True), ("chunked", False)):
            if key in r:
                axes = "".join("THW"[a] for a in frequency_axes(tuple(r["mrope_section"]), interleaved))
                found.group("axes").same(f"{r['mrope_section']} {key}", axes, r[key])


def _vision_index(path: pathlib.Path, found: CaseChecks) -> None:
    exact, weights = found.group("indices"), found.group("interpolation weights", PATCH_TOLERANCE)
    z = read_npz(path)
    for i in range(len(z)):
        if f"grid_{i}" not in z:
            break
        thw = z[f"grid_{i}"].tolist()
        frames = [(h, w) for t, h, w in thw for _ in range(t)]
        taps = [grids.position_taps(h, w, _MERGE, _TABLE_SIDE) for h, w in frames]
        index, weight = (np.concatenate(parts) for parts in zip(*taps, strict=True))
        for suffix, step in (("", 1), ("_every37", 37)):
            exact.equal(f"interp_index_{i}", index[::step], z.get(f"interp_index_{i}{suffix}"))
            weights.close(f"interp_weight_{i}", weight[::step], z.get(f"interp_weight_{i}{suffix}"))
        order = np.concatenate([grids.merge_order(h, w, _MERGE) for h, w in frames])
        exact.equal(f"rope_hw_{i}", order, z[f"rope_hw_{i}"])
        edges = np.cumsum([0, *(h * w for h, w in frames)])
        exact.equal(f"cu_seqlens_{i}", edges, z[f"cu_seqlens_{i}"])
        _windows(z, i, frames, exact)


def _windows(z: Mapping, i: int, frames: list[tuple[int, int]], exact: Comparison) -> None:
    order, sizes, start = [], [], 0
    for h, w in frames:
        order.append(start + grids.window_order(h, w, _MERGE, _WINDOW))
        sizes.append(np.bincount(grids.window_ids(h, w, _MERGE, _WINDOW)))
        start += h * w // _MERGE**2
    exact.equal(f"window_index_{i}", np.concatenate(order), z[f"window_index_{i}"])
    edges = np.cumsum([0, *np.concatenate(sizes)])
    exact.equal(f"cu_window_seqlens_{i}", edges, z[f"cu_window_seqlens_{i}"])


def _resampler(path: pathlib.Path, found: CaseChecks) -> None:
    z = read_npz(path)
    for key in z:
        if key.startswith("in_"):
            target = z[key.replace("in_", "torchvision_")]
            found.group("pixels").equal(key, resize.resize_bicubic(z[key], *target.shape[:2]), target)


def _pixels(path: pathlib.Path, found: CaseChecks, tolerance: float) -> None:
    """Compare a recorded clip or image from decoded frames to patches."""
    arrays = read_npz(path)
    still = "image" in arrays
    frames = arrays["image"][None] if still else arrays.get("frames")
    recorded = arrays.get("pixel_values" if still else "pixel_values_videos")
    if frames is None or recorded is None:
        return
    config = _config_for(recorded.shape[1])
    resized = arrays["resized"][None] if still else arrays["resized"]
    ours = resize.resize_bicubic(frames, *resized.shape[1:3])
    found.group("resize").equal("resized", ours, resized)
    if "size" in arrays and not still:  # the recording says which budget the video rule had
        budget = sorted(int(v) for v in arrays["size"])
        rule = resize.ResizeRule("total", config.factor, config.temporal_patch_size, *budget)
        size = _outcome(lambda: rule.size(len(frames), *frames.shape[1:3]))
        found.group("frame size").same("size", size, list(resized.shape[1:3]))
    patches, thw = patchify(ours, config)
    grid = arrays["image_grid_thw" if still else "video_grid_thw"][0].tolist()
    found.group("grid").same("grid_thw", list(thw), grid)
    found.group("patches", tolerance).close("pixel_values", patches, recorded)


def _config_for(patch_dim: int) -> ProcessorConfig:
    patch = round((patch_dim / (_CHANNELS * _TEMPORAL)) ** 0.5)
    mean, std = _STATISTICS.get(patch, _STATISTICS[16])
    blank = {f.name: 0 for f in dataclasses.fields(ProcessorConfig)}
    sizes = dict(family="qwen3_vl", patch_size=patch, temporal_patch_size=_TEMPORAL, merge_size=_MERGE)
    return ProcessorConfig(**{**blank, **sizes, "image_mean": mean, "image_std": std})


_TABLES: Mapping[str, Callable[[pathlib.Path, CaseChecks], None]] = {
    "frame_sampling.json": _frame_sampling,
    "smart_resize.json": _smart_resize,
    "prompts.json": _prompts,
    "mrope_axis.json": _mrope_axis,
    "vision_index.npz": _vision_index,
    "resize_uint8_bicubic.npz": _resampler,
}
