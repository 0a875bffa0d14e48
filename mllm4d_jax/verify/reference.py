"""Recorded references: one npz per case, turned into the inputs of this port.

The layout is the one `tools/record_reference.py` writes: Hugging Face tensors under fixed names, batch padded on either
side, patches of all images (and of all videos) of the batch one after the other.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import pack_vision, window_order
from mllm4d_jax.encode.positions import RULES
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import text_positions, vision_geometry
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.verify.recorded import RecordingError, read_npz

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
VARIANTS = ("", *(f"_{rule}" for rule in RULES))


@dataclasses.dataclass(frozen=True)
class RecordedRow:
    """One unpadded sample of a case: its tokens, where they sit in the padded row, its grids in reading order."""

    tokens: np.ndarray
    places: np.ndarray
    grids: tuple[Grid, ...]
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A recorded case."""

    name: str  # file stem
    arrays: Mapping[str, np.ndarray]  # the recorded tensors
    rows: tuple[RecordedRow, ...]  # the samples
    inputs: ModelInputs  # at the recorded padding, positions by `rule`
    rule: str  # the Qwen2.5-VL position rule that was used ("release" for other families)
    patch_rows: Mapping[str, np.ndarray]  # modality -> flat indices into [F*L] frames of each patch, in HF order
    patch_rows_windowed: Mapping[str, np.ndarray]  # the same in window order (Qwen2.5-VL block outputs)

    @property
    def mask(self) -> np.ndarray:
        """bool[B, S], True at real tokens."""
        return self.arrays["attention_mask"].astype(bool)

    def real(self, name: str) -> np.ndarray | None:
        """[R, .] of a recorded tensor at the R real tokens, None if it was not recorded."""
        return self.at_real_tokens(self.arrays[name]) if name in self.arrays else None

    def at_real_tokens(self, values: np.ndarray) -> np.ndarray:
        """[B, S, .] or [B*S, .] -> [R, .] at the R real tokens."""
        return values.reshape(*self.mask.shape, -1)[self.mask]

    def visual_places(self, modality: str, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        """(batch, sequence) indices of the placeholders of a modality, row-major as HF orders merged features."""
        token = config.image_token_id if modality == "image" else config.video_token_id
        return np.nonzero((self.arrays["input_ids"] == token) & self.mask)


def read_arrays(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """The arrays of a case; a `NAME_right` case borrows the pixels of `NAME`.

    Raises:
      RecordingError: unreadable file, no prompts, or no pixels anywhere for recorded grids. What is returned raises it
        for every array that is not there.
    """
    arrays = read_npz(path)
    tokens, mask = arrays["input_ids"], arrays["attention_mask"]
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise RecordingError(
            f"{path}: input_ids and attention_mask must be of one shape [B, S], got {list(tokens.shape)} and "
            f"{list(mask.shape)}: record it again"
        )
    lacking = [k for m, k in PIXELS.items() if f"{m}_grid_thw" in arrays and k not in arrays]
    if lacking:
        other = path.with_name(path.stem.removesuffix("_right") + ".npz")
        if other == path or not other.is_file():
            raise RecordingError(f"{path} has grids but no {lacking}, and there is no {other.name} to take them from")
        pixels = read_npz(other)
        arrays.update({k: pixels[k] for k in lacking})
    return arrays


def build_case(name: str, arrays: Mapping[str, np.ndarray], config: ModelConfig, rule: str) -> Case:
    """Splits the padded batch into samples and makes this port's inputs from tokens, grids and pixels alone.

    Raises:
      RecordingError: placeholders and grids disagree.
    """
    rows = _split_rows(arrays, config)
    b, s = arrays["input_ids"].shape
    positions = np.zeros((3, b, s), np.int32)
    for i, row in enumerate(rows):
        positions[:, i, row.places], _ = text_positions(config, row.tokens, row.grids, row.seconds, rule)
    grids = [g for row in rows for g in row.grids]
    index, vision = np.full((b, s), -1, np.int32), None
    patch_rows, windowed = {}, {}
    if grids:
        vision, merged_rows = pack_vision(_patches_in_reading_order(arrays, grids), grids, vision_geometry(config))
        used = 0
        for i, row in enumerate(rows):
            visual = np.isin(row.tokens, (config.image_token_id, config.video_token_id))
            index[i, row.places[visual]] = merged_rows[used : used + visual.sum()]
            used += int(visual.sum())
        patch_rows, windowed = _patch_rows(grids, vision.patches.shape[1], config)
    mask = arrays["attention_mask"].astype(np.int32)
    inputs = ModelInputs(arrays["input_ids"].astype(np.int32) * mask, positions, mask, index, vision)
    return Case(name, arrays, rows, inputs, rule, patch_rows, windowed)


def _split_rows(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[RecordedRow, ...]:
    queues = {m: iter(arrays.get(f"{m}_grid_thw", np.zeros((0, 3), int)).tolist()) for m in PIXELS}
    seconds = iter(np.asarray(arrays.get("second_per_grid_ts", ()), float).tolist())
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    rows = []
    for tokens, mask in zip(arrays["input_ids"], arrays["attention_mask"].astype(bool), strict=True):
        places = np.flatnonzero(mask)
        tokens = tokens[places].astype(np.int32)
        pending, grids, times = [kinds[t] for t in tokens.tolist() if t in kinds], [], []
        while pending:
            thw = next(queues[pending[0]], None)
            if thw is None:
                raise RecordingError(f"more {pending[0]} placeholders than {pending[0]}_grid_thw describes")
            grids.append(Grid(pending[0], *map(int, thw)))
            if pending[0] == "video" and config.family == "qwen2_5_vl":
                # Hugging Face takes one second when the caller gives none.
                times.append(next(seconds, 1.0))
            del pending[: int(np.prod(thw)) // config.vision.merge_size**2]
        rows.append(RecordedRow(tokens, places, tuple(grids), tuple(times)))
    left = [m for m, q in queues.items() if next(q, None) is not None]
    if left:
        raise RecordingError(f"{left} grids without placeholders")
    return tuple(rows)


def _patches_in_reading_order(arrays: Mapping[str, np.ndarray], grids: list[Grid]) -> np.ndarray:
    left = {m: arrays.get(key) for m, key in PIXELS.items()}
    parts = []
    for g in grids:
        part, left[g.modality] = np.split(left[g.modality], [g.t * g.h * g.w])
        parts.append(part)
    return np.concatenate(parts)


def _patch_rows(grids: list[Grid], length: int, config: ModelConfig):
    """Flat [F*L] index of every patch by modality, in HF order and in HF window order."""
    plain: dict[str, list] = {m: [] for m in PIXELS}
    windowed: dict[str, list] = {m: [] for m in PIXELS}
    geometry, frame = vision_geometry(config), 0
    m2 = geometry.merge_size**2
    for g in grids:
        n = g.h * g.w
        order = np.arange(n)
        if geometry.window:
            groups = window_order(g.h, g.w, geometry.merge_size, geometry.window)
            order = (groups[:, None] * m2 + np.arange(m2)).reshape(-1)
        for _ in range(g.t):
            plain[g.modality].append(frame * length + np.arange(n))
            windowed[g.modality].append(frame * length + order)
            frame += 1
    return [{m: np.concatenate(p) for m, p in parts.items() if p} for parts in (plain, windowed)]
