"""Shared-prefix rows: where prefixes are cut, how groups are packed, and what the arrays of a batch hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.rows.batch import RowLayout
from mllm4d_jax.rows.pack import place_branches
from mllm4d_jax.rows.rows import Group, RowSizes, collate_rows, needed_sizes, pack_groups, share_prefix

GEOMETRY = VisionGeometry(merge_size=2, position_side=4, window=0)
IDS = (8, 9)
V = 9  # video placeholder
CLIP = (1, V, V, 2)  # two merged tokens
GRID = (Grid("video", 2, 2, 2),)


def example(tokens, targets=1, grids=GRID, seed=0, key="f#0", shift=0):
    """The last `targets` tokens are supervised; patches are a function of `seed`."""
    n = sum(g.t * g.h * g.w for g in grids)
    supervised = np.arange(len(tokens)) >= len(tokens) - targets
    return Example(
        key=key,
        tokens=np.array(tokens, np.int32),
        positions=np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1)) + shift,
        rope_delta=0,
        supervised=supervised,
        patches=np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32),
        grids=tuple(grids),
        timestamps=(),
        text="",
    )


def shared(*examples):
    return [(len(g.examples), g.shared) for g in share_prefix(examples, IDS)]


def test_prefix_is_what_all_have_in_common():
    assert shared(example([*CLIP, 3, 4, 5]), example([*CLIP, 3, 6, 7])) == [(2, 5)]
    assert shared(example([*CLIP, 3, 4, 5]), example([*CLIP, 3, 6, 7]), example([*CLIP, 7])) == [(3, 4)]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (example([*CLIP, 3, 4, 5]), example([*CLIP, 3, 4, 5]), 6),  # equal: the supervised token stays outside
        (example([*CLIP, 3, 4, 5], targets=2), example([*CLIP, 3, 4, 6]), 5),  # the earlier target decides
        (example([*CLIP, 3, 4, 5], targets=0), example([*CLIP, 3, 4, 5], targets=0), 6),  # one token must remain
        (example([*CLIP, 3], targets=0), example([*CLIP, 3, 4, 5]), 4),
    ],
)
def test_prefix_ends_before_targets_and_leaves_a_token(a, b, expected):
    assert shared(a, b) == [(2, expected)]


def test_single_examples():
    assert shared(example([*CLIP, 3, 4, 5])) == [(1, 3)]  # after the last visual token
    assert shared(example([1, 2, 3, 4], grids=())) == [(1, 3)]  # without media: before the first target
    assert shared(example([1, 2], targets=2, grids=())) == [(1, 1)]


@pytest.mark.parametrize(
    "other",
    [
        example([*CLIP, 3, 6], seed=1),  # other pixels
        example([7, V, V, 2, 3, 6]),  # other text before the video
        example([*CLIP, 3, 6], shift=1),  # other positions
        example([1, V, V, V, V, 3, 6], grids=(Grid("video", 4, 2, 2),)),
        example([1, V, V, 3], grids=(Grid("video", 1, 2, 4),)),  # same tokens, other grid
        example([1, 3, 4], grids=()),
    ],
)
def test_different_beginnings_stay_apart_in_order(other):
    a, c = example([*CLIP, 3, 4, 5], key="a"), example([*CLIP, 3, 7], key="c")
    groups = share_prefix([a, other, c], IDS)
    assert [[e.tokens.tolist() for e in g.examples] for g in groups] == [
        [a.tokens.tolist(), c.tokens.tolist()],
        [other.tokens.tolist()],
    ]


def test_targets_before_a_later_image_stay_in_the_prefix_and_count_for_every_example():
    tokens = [1, V, V, 3, 4, V, V, 5, 6]
    two = (*GRID, *GRID)
    a, b = example(tokens, grids=two), example([*tokens[:-1], 7], grids=two)
    for e in (a, b):
        e.supervised.setflags(write=True)
        e.supervised[4] = True
    (group,) = share_prefix([a, b], IDS)
    assert group.shared == 8
    batch = collate_rows([[group]], needed_sizes([[group]], GEOMETRY), GEOMETRY, visual_token_ids=IDS)
    assert batch.loss_index.tolist() == [[3, 7, 7]]
    assert batch.loss_target.tolist() == [[4, 6, 7]]
    assert batch.loss_weight.tolist() == [[2, 1, 1]]


def three_groups():
    clip = [example([*CLIP, 3, 4, 5], targets=2, key="a"), example([*CLIP, 6, 7, 3, 5], targets=1, key="b")]
    image = example([1, 8, 2, 4], grids=(Grid("image", 1, 2, 2),), seed=3, key="c")
    text = example([5, 6, 7], grids=(), key="d")
    return share_prefix(clip, IDS) + share_prefix([image], IDS) + share_prefix([text], IDS)


def test_arrays_of_a_batch():
    clip, image, text = three_groups()
    rows = [[text], [clip, image], []]
    assert needed_sizes(rows, GEOMETRY) == RowSizes(6, 3, 4, frames=3, frame_patches=4, supervised=4)
    assert needed_sizes(rows, GEOMETRY, (2, 5, 8)) == RowSizes(6, 2, 5, frames=3, frame_patches=4, supervised=4)
    sizes = RowSizes(7, 3, 5, frames=4, frame_patches=8, supervised=6)
    batch = collate_rows(rows, sizes, GEOMETRY, visual_token_ids=IDS)
    inputs = batch.inputs
    assert inputs.layout == RowLayout(7, 3, 5) and inputs.layout.size == 22
    # The longest branch comes first; the image's fits behind the clip's other one.
    assert inputs.tokens[1].tolist() == [1, V, V, 2, 1, 8, 0] + [6, 7, 3, 5, 0] + [3, 4, 5, 2, 4] + [0] * 5
    assert inputs.segment_ids[1].tolist() == [1] * 4 + [2] * 2 + [0] + [1] * 4 + [0] + [1] * 3 + [2] * 2 + [0] * 5
    assert (inputs.positions[:, 1, 12:17] == [4, 5, 6, 2, 3]).all()
    assert inputs.tokens[0, :2].tolist() == [5, 6] and inputs.tokens[0, 7:9].tolist() == [7, 0]
    assert not inputs.segment_ids[2].any() and not inputs.tokens[2].any()
    # The first branch token is predicted by its clip's last prefix position.
    assert batch.loss_index.tolist() == [[1, 0, 0, 0, 0, 0], [12, 13, 9, 15, 0, 0], [0] * 6]
    assert batch.loss_target.tolist() == [[7, 0, 0, 0, 0, 0], [4, 5, 5, 4, 0, 0], [0] * 6]
    assert batch.loss_weight.tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert {x.dtype.name for x in (inputs.tokens, inputs.positions, batch.loss_index, batch.loss_target)} == {"int32"}


def test_rows_of_one_clip_say_so():
    """Only then may a kernel go by lengths; sizes that say so are not used for rows of several."""
    clip, image, text = three_groups()
    alone = needed_sizes([[clip], [image], []], GEOMETRY)
    assert not alone.packed and not alone.layout.packed
    packed = needed_sizes([[clip], [image, text]], GEOMETRY)
    assert packed.packed and packed.layout.packed
    with pytest.raises(ValueError, match="the row that starts with c has 2 clips, and the sizes are of rows of one"):
        collate_rows([[clip], [image, text]], dataclasses.replace(packed, packed=False), GEOMETRY, visual_token_ids=IDS)


def test_every_row_has_its_own_frames():
    clip, image, text = three_groups()
    sizes = RowSizes(7, 4, 5, frames=4, frame_patches=8, supervised=5)
    inputs = collate_rows([[text], [clip, image], [image]], sizes, GEOMETRY, visual_token_ids=IDS).inputs
    # Two merged tokens per frame of 8 patches: the clip's frames give 0 and 2, the image's frame is the row's third.
    assert inputs.vision_index[1, :6].tolist() == [-1, 0, 2, -1, -1, 4]
    assert inputs.vision_index[2, :3].tolist() == [-1, 0, -1]
    assert (inputs.vision_index[0] == -1).all() and (inputs.vision_index[1:, 6:] == -1).all()
    patches = inputs.vision.patches.reshape(3, 4, 8, 5)
    np.testing.assert_array_equal(patches[1, :2, :4].reshape(8, 5), clip.examples[0].patches)
    np.testing.assert_array_equal(patches[1, 2, :4], image.examples[0].patches)
    np.testing.assert_array_equal(patches[2, 0, :4], image.examples[0].patches)
    real = inputs.vision.frame_segments.reshape(3, 4, 8)
    assert real.sum((1, 2)).tolist() == [0, 12, 4] and not patches[~real.astype(bool)].any()


def test_batches_without_media_or_without_anything():
    text = three_groups()[2]
    sizes = needed_sizes([[text], []], GEOMETRY)
    assert sizes.frames == 0
    assert collate_rows([[text], []], sizes, GEOMETRY, visual_token_ids=IDS).inputs.vision is None
    bucket = RowSizes(4, 2, 4, frames=2, frame_patches=8, supervised=3)
    vision = collate_rows([[text]], bucket, GEOMETRY, visual_token_ids=IDS).inputs.vision
    assert vision.patches.shape == (2, 8, 5) and not vision.frame_segments.any() and not vision.table_weight.any()
    given = collate_rows([[text]], bucket, GEOMETRY, visual_token_ids=IDS, patch_dim=3).inputs.vision
    assert given.patches.shape == (2, 8, 3)  # a record of text alone need not know how large patches are
    empty = collate_rows([[], []], bucket, GEOMETRY, visual_token_ids=IDS, patch_dim=5)
    assert empty.inputs.vision.patches.shape == (4, 8, 5) and not empty.loss_weight.any()
    with pytest.raises(ValueError, match="give patch_dim"):
        collate_rows([[]], bucket, GEOMETRY, visual_token_ids=IDS)
    assert needed_sizes([[]], GEOMETRY) == RowSizes(1, 1, 1, 0, 0, 1, packed=False)


def branches(key, seed, *lengths):
    """A clip with one question of each length behind its last visual token."""
    return share_prefix([example([*CLIP[:3], *range(10 + n, 10 + 2 * n)], seed=seed, key=key) for n in lengths], IDS)


def test_slots_hold_branches_of_different_clips():
    row = [g for n, lengths in enumerate([(3, 6), (11,), (8,)]) for g in branches(f"{n}", n, *lengths)]
    placed, slots = place_branches([g.branches for g in row], 15)
    assert slots == 2 and placed == [[(0, 11), (1, 8)], [(0, 0)], [(1, 0)]]
    # A clip's branches stay apart, so slots of 20 are filled in another way, which takes more of them.
    assert place_branches([g.branches for g in row], 20)[1] == 3
    agreed = dataclasses.replace(needed_sizes([row], GEOMETRY, (15,)), length=20)
    with pytest.raises(ValueError, match="needs 3 branch slots and has 2"):
        collate_rows([row], agreed, GEOMETRY, visual_token_ids=IDS)
    batch = collate_rows([row], agreed, GEOMETRY, visual_token_ids=IDS, packed_length=15)
    slots = batch.inputs.segment_ids[0, 9:].reshape(2, 20)
    assert [np.bincount(slot, minlength=4).tolist() for slot in slots] == [[6, 3, 11, 0], [6, 6, 0, 8]]


def test_no_placement_takes_more_than_it_must():
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = [rng.integers(1, 40, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 7))]
        length = int(rng.integers(40, 90))
        placed, slots = place_branches(row, length)
        used = np.zeros((slots, length), int)
        for group, places in zip(row, placed, strict=True):
            assert len({slot for slot, _ in places}) == len(group)
            for n, (slot, start) in zip(group, places, strict=True):
                used[slot, start : start + n] += 1
        assert used.max() == 1 and used[:, 0].all() and used.sum() == sum(map(sum, row))
        assert max(map(len, row)) <= slots <= sum(map(len, row))


def test_packing_is_even_and_deterministic():
    rng = np.random.default_rng(0)
    groups = []
    for i in range(30):
        questions = [example([*CLIP, 3, *rng.integers(10, 20, n)], key=f"{i}") for n in rng.integers(2, 9, 3)]
        groups += share_prefix(questions, IDS)
    packed = pack_groups(groups, 4)
    assert sorted(g.examples[0].key for row in packed for g in row) == sorted(g.examples[0].key for g in groups)
    assert [[g.examples[0].key for g in row] for row in pack_groups(groups, 4)] == [
        [g.examples[0].key for g in row] for row in packed
    ]
    prefixes = [sum(g.shared for g in row) for row in packed]
    branched = [sum(sum(g.branches) for g in row) for row in packed]
    assert max(prefixes) + max(branched) <= 1.05 * (sum(prefixes) + sum(branched)) / 4
    assert [len(row) for row in pack_groups(groups[:1], 3)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prefix=5), "c: a row needs 6 prefix tokens and has 5"),
        (dict(slots=2), "row that starts with a needs 3 branch slots and has 2"),
        (dict(length=3), "b: 4 branch tokens for slots of 3"),
        (dict(frames=2), "row that starts with a: .*2 frames x 4 patches cannot hold 3 frames"),
        (dict(frames=0), "a has images or videos and the sizes leave no frames"),
        (dict(supervised=3), "4 supervised tokens for lists of 3, in the row that starts with a"),
    ],
)
def test_too_small_sizes_name_the_record(change, message):
    clip, image, text = three_groups()
    rows = [[clip, image], [text]]
    sizes = dataclasses.replace(needed_sizes(rows, GEOMETRY), **change)
    with pytest.raises(ValueError, match=message):
        collate_rows(rows, sizes, GEOMETRY, visual_token_ids=IDS)


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="f#0: nothing follows the first 3 tokens"):
        share_prefix([example([1, V, V])], IDS)
    with pytest.raises(ValueError, match="f#0: a prefix of 7 tokens leaves no branch"):
        Group((example([*CLIP, 3, 4, 5]),), 7)
    late = Group((example([*CLIP, 3]),), 2)
    with pytest.raises(ValueError, match="f#0: a visual token after the first 2 tokens"):
        collate_rows([[late]], needed_sizes([[late]], GEOMETRY), GEOMETRY, visual_token_ids=IDS)
    short = Group((example([1, V, 2, 3]),), 3)
    with pytest.raises(ValueError, match="f#0: 1 visual placeholders for 2 merged patches"):
        collate_rows([[short]], needed_sizes([[short]], GEOMETRY), GEOMETRY, visual_token_ids=IDS)
