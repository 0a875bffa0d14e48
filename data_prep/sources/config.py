"""Config of the `curate` task -> its source of clips."""

from __future__ import annotations

from pathlib import Path

import ml_collections

from data_prep.sources.base import Source, Stereo4DSource, SyntheticSource
from data_prep.sources.monocular import MonocularSource
from data_prep.sources.stereo import StereoSource
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.media.decode_pool import DecodePool

# What has to be in the input folder, for the message that it is not.
_SIDECARS = "<clip>-masks.npz or .json, <clip>-captions.json"
EXPECTED = {
    "stereo4d": f"Stereo4D annotations: <clip>.npz with <clip>-left_rectified.mp4 (or a folder of images), {_SIDECARS}",
    "stereo": f"stereo videos: <clip>-left.mp4 and <clip>-right.mp4, or packed <clip>.mp4 (stereo.layout), {_SIDECARS}",
    "monocular": f"<clip>.mp4 with <clip>-spatialtracker.npz and a folder <clip>-moge, {_SIDECARS}",
}


class SourceError(ValueError):
    """The configured input holds no clips."""


def make_source(config: ml_collections.ConfigDict, workdir: Path) -> Source:
    """The source that the config names.

    Args:
      workdir: absolute; rendered clips, written videos and kept scenes go there.

    Raises:
      SourceError: there are no clips; says what is looked for.
    """
    source = _source(config, workdir)
    if not source.clip_ids():
        raise SourceError(f"input = '{config.input}' holds no {EXPECTED[config.source]}")
    return source


def _source(config: ml_collections.ConfigDict, workdir: Path) -> Source:
    if config.source == "synthetic":
        s = config.synthetic
        made = SyntheticConfig(height=s.height, width=s.width, frames=s.frames, fps=s.fps, stereo=s.stereo)
        return SyntheticSource(workdir, made, config.seed, s.clips)
    if not config.input:
        raise SourceError(f"input is not set: --config.input=DIR with {EXPECTED[config.source]}")
    folder, videos = Path(config.input).absolute(), workdir / "videos"
    if config.source == "stereo4d":
        return Stereo4DSource(folder, videos if config.stereo4d.frames == "images" else folder)
    pool = DecodePool(config.decode_timeout_s)
    if config.source == "monocular":
        return MonocularSource(folder, folder, config.monocular.max_spread, pool)
    s = config.stereo
    return StereoSource(
        folder,
        root=folder if s.layout == "pair" else videos,
        scenes=workdir / "scenes",
        layout=s.layout,
        fov_degrees=s.fov_degrees,
        baseline=s.baseline or None,
        max_frames=s.max_frames,
        max_disparity=s.max_disparity or None,
        pool=pool,
    )
