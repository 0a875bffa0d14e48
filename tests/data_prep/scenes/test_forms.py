"""Forms of a clip: what is true of them, by the pixels of rendered frames and by the relation solver."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_prep.scenes.forms import FORMS, frames_in_form, scene_in_form
from data_prep.scenes.objects import project
from data_prep.scenes.relations import RULES, measure_camera, measure_object
from data_prep.synthetic.clip import make_clip
from data_prep.synthetic.worlds import SyntheticConfig
from tests.data_prep.scenes.random_scenes import random_scene


@pytest.mark.parametrize("form", FORMS)
def test_points_fall_on_the_pixels_of_their_object_in_the_frames_of_the_form(form):
    looked = 0
    for index in range(4):
        clip = make_clip(3, index, SyntheticConfig(height=48, width=64, frames=5))
        scene, frames = scene_in_form(clip.scene, form), frames_in_form(clip.left, form)
        for thing, before in zip(scene.objects, clip.scene.objects, strict=True):
            for t in range(scene.num_frames):
                pixels, _ = project(
                    thing.points[t][:, None], scene.world_to_camera[t : t + 1], scene.intrinsics[t : t + 1]
                )
                x, y = np.nan_to_num(pixels[:, 0], nan=-1).astype(int).T
                seen = thing.seen()[t]
                assert thing.masks[t][y[seen], x[seen]].all()
                looked += seen.sum()
                source = -1 - t if FORMS[form][1] else t
                colours = np.sort(frames[t][thing.masks[t]], axis=0)
                assert (colours == np.sort(clip.left[source][before.masks[source]], axis=0)).all()
    assert looked > 200


@pytest.mark.parametrize("form", FORMS)
def test_relations_are_those_of_the_clip_with_sides_or_frames_exchanged(form):
    mirrored, backwards = FORMS[form]
    first, last = np.array([0, 1]), np.array([5, 3])
    for seed in range(5):
        before = random_scene(seed, objects=2)
        after = scene_in_form(before, form)
        assert after.source_id == before.source_id and after.clip_id != before.clip_id
        assert (np.diff(after.timestamps) > 0).all()
        there, back = [before.num_frames - 1 - frame for frame in (first, last)] if backwards else (first, last)
        right, found = measure_camera(before, there, back), measure_camera(after, first, last)
        for a, b in zip(before.objects, after.objects, strict=True):
            right |= {f"{a.object_id} {n}": v for n, v in measure_object(before, a, there, back, RULES)[1].items()}
            found |= {f"{a.object_id} {n}": v for n, v in measure_object(after, b, first, last, RULES)[1].items()}
        for name, value in right.items():
            side = {"camera_relative_direction": np.array([-1, 1, 1])}.get(name, -1 if "lateral" in name else 1)
            np.testing.assert_allclose(found[name], value * side if mirrored else value, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_a_form_is_the_clip_again(form):
    scene = random_scene(1, objects=2)
    again = scene_in_form(scene_in_form(scene, form), form)
    for name in ("camera_to_world", "intrinsics", "timestamps"):
        np.testing.assert_allclose(getattr(again, name), getattr(scene, name), atol=1e-12)
    for a, b in zip(again.objects, scene.objects, strict=True):
        np.testing.assert_array_equal(a.points, b.points)


def test_sides_that_a_description_names_are_exchanged_in_a_mirror_alone():
    scene = random_scene(1, objects=1)
    named = dataclasses.replace(scene.objects[0], description="Left cup in a right hand, bright")
    scene = dataclasses.replace(scene, objects=(named,))
    assert scene_in_form(scene, "mirrored").objects[0].description == "Right cup in a left hand, bright"
    assert scene_in_form(scene, "backwards").objects[0].description == named.description
