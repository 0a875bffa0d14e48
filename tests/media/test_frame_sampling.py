"""Frame numbers of the Qwen2.5-VL rule against the video processor of the installed transformers, clip by clip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mllm4d_jax.media.frame_sampling import SampleRule, SamplingError, sample_indices

RATES = (12.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0)
ASKED = (*({"fps": fps} for fps in (0.5, 1.0, 2.0, 4.0)), *({"num_frames": n} for n in (8, 16, 32)))


@pytest.mark.slow
def test_every_clip_of_a_grid_as_transformers_samples_it():
    pytest.importorskip("torchvision")
    transformers = pytest.importorskip("transformers")
    processor = transformers.Qwen2VLVideoProcessor()
    compared = 0
    for total, rate, asked in itertools.product(range(10, 970, 2), RATES, ASKED):
        clip = transformers.video_utils.VideoMetadata(total_num_frames=total, fps=rate)
        try:
            theirs = processor.sample_frames(clip, **asked).tolist()
        except ValueError:
            with pytest.raises(SamplingError):
                sample_indices("qwen2_5_vl", total, rate, **asked)
            continue
        assert sample_indices("qwen2_5_vl", total, rate, **asked).tolist() == theirs, (total, rate, asked)
        compared += 1
    assert compared > 26_000


def test_a_product_just_below_a_whole_number_is_that_number():
    """7 * (230 / 14) is 114.99999999999999 in float64 and 115 in float32, where the processor takes the floor.

    The same happens at the end of the clip: index 14 is 230, which is no frame, and a clip keeps its 14.
    """
    found = sample_indices("qwen2_5_vl", 230, 60.0, fps=4.0)
    assert found.tolist() == [0, 16, 32, 49, 65, 82, 98, 115, 131, 147, 164, 180, 197, 213, 230]
    assert SampleRule("qwen2_5_vl", 32, 4.0).indices(230, 60.0).tolist() == found[:14].tolist()


def test_an_even_number_of_frames_stays_even():
    for total, rate, fps in itertools.product(range(10, 970, 7), RATES, (0.5, 1.0, 2.0, 4.0)):
        found = SampleRule("qwen2_5_vl", 32, fps).indices(total, rate)
        assert len(found) % 2 == 0 and (np.diff(found) > 0).all() and found[-1] < total, (total, rate, fps)
