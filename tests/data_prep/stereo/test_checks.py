"""Pairs that match and are still wrong: each is refused, and the refusal names the cause."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_prep.stereo.disparity import StereoError
from tests.data_prep.stereo.stereo_world import make_clip, shift_right, through_lens
from tests.data_prep.stereo.test_stereo import reconstruct


@pytest.fixture(scope="module")
def clip():
    return make_clip(seed=3, frames=6, size=192)


@pytest.fixture(scope="module")
def wide():
    return make_clip(seed=3, frames=2, size=192, fov_degrees=100, baseline=0.2)


@pytest.mark.parametrize("pixels", [-1.5, -1.0, 1.0])
def test_principal_points_that_differ_are_measured_and_refused(clip, pixels):
    with pytest.raises(StereoError, match="disparity_offset") as caught:
        reconstruct(shift_right(clip, pixels))
    assert caught.value.reason == "low_quality" and "principal points differ" in str(caught.value)


def test_a_known_offset_is_taken_away(clip):
    told = reconstruct(shift_right(clip, -1.5), disparity_offset=1.5)
    plain = reconstruct(clip)
    assert abs(told.quality.disparity_offset) < 0.3 and abs(plain.quality.disparity_offset) < 0.3
    assert np.nanmedian(np.abs(told.depths / clip.depth - 1)) < 1.5 * np.nanmedian(
        np.abs(plain.depths / clip.depth - 1)
    )
    assert told.scene.provenance["parameters"]["disparity_offset"] == 1.5


def test_a_camera_that_does_not_move_tells_no_offset(clip):
    frames = [0, 0, 0]
    still = dataclasses.replace(clip, left=clip.left[frames], right=clip.right[frames], masks=clip.masks[frames])
    assert reconstruct(still).quality.as_dict()["disparity_offset"] is None


@pytest.mark.parametrize("lens", ["fisheye", "equirectangular"])
@pytest.mark.parametrize("known_field", [True, False])
def test_views_that_are_not_perspective_are_refused(wide, lens, known_field):
    camera = {"intrinsics": wide.intrinsics} if known_field else {}
    with pytest.raises(StereoError, match="not perspective") as caught:
        reconstruct(through_lens(wide, lens), **camera)
    assert caught.value.reason == "low_quality"


def test_a_wide_perspective_view_is_not(wide):
    assert abs(reconstruct(wide, intrinsics=wide.intrinsics).quality.row_curvature) < 0.05


@pytest.mark.parametrize(
    ("fault", "reason", "cause"),
    [
        (lambda clip: {"left": clip.right, "right": clip.left}, "low_quality", "the eyes look swapped"),
        (lambda clip: {"max_disparity": 3}, "low_quality", "search is too small.*stereo.max_disparity to [12]"),
        (lambda clip: {"max_disparity": 7}, "low_quality", "beyond_search 0.*search is too small.*max_disparity to 1"),
        (lambda clip: {"baseline": 120.0}, "out_of_range", "Is the baseline in metres"),
        (lambda clip: {"baseline": 0.00012}, "out_of_range", "Is the baseline in metres"),
    ],
    ids=["swapped", "search", "search_of_most", "millimetres", "kilometres"],
)
def test_refusals_name_the_likely_cause(clip, fault, reason, cause):
    changes = fault(clip)
    views = {name: changes.pop(name) for name in ("left", "right") if name in changes}
    with pytest.raises(StereoError, match=cause) as caught:
        reconstruct(dataclasses.replace(clip, **views), **changes)
    assert caught.value.reason == reason


def test_the_usual_search_is_widened_where_the_view_needs_it():
    near = make_clip(seed=3, frames=3, baseline=0.5)
    found = reconstruct(near)
    searched = found.scene.provenance["parameters"]["max_disparity"]
    assert searched > near.left.shape[2] // 8 == 24 and found.quality.beyond_search == 0
    error = np.abs(found.depths / near.depth - 1)[near.masks]
    assert np.isfinite(error).mean() > 0.8 and np.nanmedian(error) < 0.01
    with pytest.raises(StereoError, match="search is too small"):
        reconstruct(near, max_disparity=24)
