"""Shared-prefix rows: what all questions about a clip have in common is laid out, and computed, once.

A row has a prefix region of P slots and N branch slots of L tokens each. The prefix region holds the prefixes (system
text and video) of one or more clips, one after the other. A branch slot holds a branch (the rest of a prompt and its
answer) of one of these clips from its first position on, and behind it as many branches of other clips as fit.
`segment_ids` numbers the clips of a row from 1, prefix and branches of a clip alike; 0 is padding. A query sees a key
of its own segment that does not come later and lies in the prefix region or in the query's own branch slot; two
branches of one clip are never in one slot. Every token keeps the position it has in its own example, so a branch
continues from its prefix and the row computes what N separate samples would.

A row is whole in itself: it has its own vision frames and its own list of loss positions, and its indices point into
nothing else. Rows can then be split over devices and hosts, and no device needs what another one has computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.rows.batch import ModelInputs, RowLayout, pack_rows, visual_places
from mllm4d_jax.rows.pack import place_branches, spread


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples about the same media that share their beginning.

    Attributes:
      examples: at least one.
      shared: their first `shared` tokens and positions are equal and hold every visual token; each has more tokens.
    """

    examples: tuple[Example, ...]
    shared: int

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("a group needs at least one example")
        for e in self.examples:
            if not 1 <= self.shared < len(e.tokens):
                raise ValueError(f"{e.key}: a prefix of {self.shared} tokens leaves no branch of its {len(e.tokens)}")

    @property
    def branches(self) -> tuple[int, ...]:
        """Tokens of each branch."""
        return tuple(len(e.tokens) - self.shared for e in self.examples)


@dataclasses.dataclass(frozen=True)
class RowSizes:
    """Static sizes of a batch of rows.

    Attributes:
      prefix, slots, length: see `RowLayout`.
      frames: frames F of the vision tower for each row, 0 when nothing has images or videos.
      frame_patches: patches per frame n, 0 likewise.
      supervised: entries M of each row's loss lists.
      packed: see `RowLayout`.
    """

    prefix: int
    slots: int
    length: int
    frames: int
    frame_patches: int
    supervised: int
    packed: bool = True

    @property
    def layout(self) -> RowLayout:
        return RowLayout(self.prefix, self.slots, self.length, bool(self.packed))


class RowBatch(NamedTuple):
    """What one training step consumes; a pytree of NumPy arrays and the static layout.

    Attributes:
      inputs: the rows. Frame f of row b is frame `b * F + f` of `vision`, and `vision_index` counts from the first
        merged token of the row's own frames.
      loss_index: i32[B, M] positions in the row of the hidden states that predict supervised tokens. The first token
        of a branch is predicted at the last prefix position of its clip.
      loss_target: i32[B, M] the predicted tokens.
      loss_weight: f32[B, M] 0 for padding of M, else the number of examples that have this target: 1, except for
        targets inside a shared prefix.
    """

    inputs: ModelInputs
    loss_index: np.ndarray
    loss_target: np.ndarray
    loss_weight: np.ndarray


def share_prefix(examples: Sequence[Example], visual_token_ids: Sequence[int]) -> tuple[Group, ...]:
    """Groups examples so that each group's common beginning can be computed once.

    Examples go together when media, tokens and positions agree up to the last visual token (without media: in the
    first token). The prefix of several examples is as long as they agree, but ends before the next supervised token
    and leaves each at least one token; that of a single one ends after its last visual token, or without media
    before its first supervised token. Targets that stand before the last visual token stay in the prefix.

    Returns:
      Groups in the order of their first examples; examples keep their order.

    Raises:
      ValueError: nothing follows an example's last visual token.
    """
    groups: list[tuple[int, list[Example]]] = []
    for e in examples:
        # The shortest prefix: to the last visual token, and at least one token that predicts the next.
        visual = np.flatnonzero(np.isin(e.tokens, visual_token_ids))
        floor = int(visual[-1]) + 1 if len(visual) else 1
        if floor >= len(e.tokens):
            raise ValueError(f"{e.key}: nothing follows the first {floor} tokens, so there is no branch to train on")
        for other_floor, members in groups:
            if other_floor == floor and _same_beginning(members[0], e, floor):
                members.append(e)
                break
        else:
            groups.append((floor, [e]))
    return tuple(Group(tuple(members), _shared(members, floor)) for floor, members in groups)


def _same_beginning(a: Example, b: Example, floor: int) -> bool:
    return (
        tuple(a.grids) == tuple(b.grids)
        and np.array_equal(a.tokens[:floor], b.tokens[:floor])
        and np.array_equal(a.positions[:, :floor], b.positions[:, :floor])
        and (a.patches is b.patches or np.array_equal(a.patches, b.patches))
    )


def _shared(members: Sequence[Example], floor: int) -> int:
    first, *others = members
    targets = [floor + int(np.argmax(e.supervised[floor:])) for e in members if e.supervised[floor:].any()]
    if not others and len(first.grids):
        return floor
    end = min([len(e.tokens) - 1 for e in members] + targets)
    for e in others:
        same = (first.tokens[:end] == e.tokens[:end]) & (first.positions[:, :end] == e.positions[:, :end]).all(0)
        end = int(np.argmin(same)) if not same.all() else end
    return max(end, floor)


def pack_groups(groups: Sequence[Group], rows: int) -> list[list[Group]]:
    """Spreads groups over `rows` rows so that their common shape is small (`pack.spread`). Rows may stay empty."""
    return [[groups[i] for i in row] for row in spread([(g.shared, g.branches) for g in groups], rows)]


def needed_sizes(rows: Sequence[Sequence[Group]], geometry: VisionGeometry, lengths: Sequence[int] = ()) -> RowSizes:
    """The smallest sizes that hold `rows`; frame patches are whole merge blocks of `geometry` already.

    Args:
      rows: the groups of each row.
      geometry: numbers of the vision tower.
      lengths: allowed lengths of a branch slot, ascending. The first one that holds every branch is taken, and branches
        are placed in slots of that length; where none does, the length of the longest branch.
    """
    groups = [g for row in rows for g in row]
    grids = [grid for g in groups for grid in g.examples[0].grids]
    for grid in grids:
        if grid.h % geometry.merge_size or grid.w % geometry.merge_size:
            raise ValueError(f"a grid of {grid.h}x{grid.w} patches cannot be merged in {geometry.merge_size}s")
    longest = max([1, *(max(g.branches) for g in groups)])
    length = next((n for n in lengths if n >= longest), longest)
    return RowSizes(
        prefix=max([1, *(sum(g.shared for g in row) for row in rows)]),
        slots=max([1, *(place_branches([g.branches for g in row], length)[1] for row in rows)]),
        length=length,
        frames=max((sum(grid.t for g in row for grid in g.examples[0].grids) for row in rows), default=0),
        frame_patches=max((grid.h * grid.w for grid in grids), default=0),
        supervised=max([1, *(sum(len(_targets(g)) for g in row) for row in rows)]),
        packed=any(len(row) > 1 for row in rows),
    )


def collate_rows(
    rows: Sequence[Sequence[Group]],
    sizes: RowSizes,
    geometry: VisionGeometry,
    *,
    visual_token_ids: Sequence[int],
    patch_dim: int | None = None,
    packed_length: int | None = None,
) -> RowBatch:
    """Lays groups out as rows; the patches of each clip appear once.

    Args:
      rows: the groups of each of B rows; a row without any is all padding.
      sizes: at least `needed_sizes(rows, geometry)`.
      geometry: numbers of the vision tower.
      visual_token_ids: image and video placeholder ids.
      patch_dim: numbers per patch; needed only when `sizes` has frames and no row has media.
      packed_length: the slot length that `needed_sizes` counted the slots for, if `sizes` has longer ones: more room in
        a slot can make the placement of branches another one, and that one needs more slots now and then.

    Raises:
      ValueError: a size is too small, a branch has a visual token, or placeholders and merged patches differ in number.
        The message names the record.
    """
    layout = sizes.layout
    b, s = len(rows), layout.size
    tokens, segments = np.zeros((b, s), np.int32), np.zeros((b, s), np.int32)
    index, positions = np.full((b, s), -1, np.int32), np.zeros((3, b, s), np.int32)
    losses = np.zeros((b, sizes.supervised, 3), np.int32)
    clips = [[group.examples[0] for group in row] for row in rows]
    vision, merged = pack_rows(clips, sizes.frames, sizes.frame_patches, geometry, patch_dim)
    for i, row in enumerate(rows):
        if len(row) > 1 and not layout.packed:
            raise ValueError(f"{_named(row)} has {len(row)} clips, and the sizes are of rows of one")
        used, entries = 0, []
        places = _places(row, layout, packed_length or layout.length)
        for segment, (group, start, branches) in enumerate(places, 1):
            visual = _visual(group, visual_token_ids, geometry)
            index[i, start + visual] = merged[i][used : used + len(visual)]
            used += len(visual)
            spans = [(group.examples[0], slice(0, group.shared), start)]
            spans += [(e, slice(group.shared, None), at) for e, at in zip(group.examples, branches, strict=True)]
            for e, part, at in spans:
                there = slice(at, at + len(e.tokens[part]))
                tokens[i, there], segments[i, there] = e.tokens[part], segment
                positions[:, i, there] = e.positions[:, part]
            for j, t, weight in _targets(group):
                # Token t is predicted one token before it, which is in the prefix for a branch's first token.
                before = start + t - 1 if t <= group.shared else branches[j] + t - 1 - group.shared
                entries.append((before, group.examples[j].tokens[t], weight))
        if len(entries) > sizes.supervised:
            raise ValueError(f"{len(entries)} supervised tokens for lists of {sizes.supervised}, in {_named(row)}")
        losses[i, : len(entries)] = np.asarray(entries, np.int32).reshape(-1, 3)
    inputs = ModelInputs(tokens, positions, segments, index, vision, layout)
    loss_index, loss_target, loss_weight = (np.ascontiguousarray(losses[..., n]) for n in range(3))
    return RowBatch(inputs, loss_index, loss_target, loss_weight.astype(np.float32))


def _named(row: Sequence[Group]) -> str:
    return f"the row that starts with {row[0].examples[0].key}"


def _places(row: Sequence[Group], layout: RowLayout, length: int) -> Iterator[tuple[Group, int, list[int]]]:
    """Each group of a row with the start of its prefix and of each of its branches."""
    for group in row:
        for e, tokens in zip(group.examples, group.branches, strict=True):
            if tokens > length:
                raise ValueError(f"{e.key}: {tokens} branch tokens for slots of {length}")
    placed, slots = place_branches([group.branches for group in row], length)
    if slots > layout.slots:
        raise ValueError(f"{_named(row)} needs {slots} branch slots and has {layout.slots}")
    start = 0
    for group, places in zip(row, placed, strict=True):
        if start + group.shared > layout.prefix:
            key = group.examples[0].key
            raise ValueError(f"{key}: a row needs {start + group.shared} prefix tokens and has {layout.prefix}")
        yield group, start, [layout.prefix + slot * layout.length + offset for slot, offset in places]
        start += group.shared


def _visual(group: Group, visual_token_ids: Sequence[int], geometry: VisionGeometry) -> np.ndarray:
    """Indices of the visual tokens of the prefix, checked."""
    for e in group.examples:
        if np.isin(e.tokens[group.shared :], visual_token_ids).any():
            raise ValueError(f"{e.key}: a visual token after the first {group.shared} tokens, which are the prefix")
    return visual_places(group.examples[0], visual_token_ids, geometry, group.shared)


def _targets(group: Group) -> list[tuple[int, int, int]]:
    """(example, token index, weight) of every supervised token; those of the prefix appear once, with their count.

    The first token of an example has nothing before it that could predict it.
    """
    inside = np.sum([e.supervised[: group.shared] for e in group.examples], 0, dtype=np.int32)
    targets = [(0, int(t), int(inside[t])) for t in np.flatnonzero(inside) if t]
    for j, e in enumerate(group.examples):
        targets += [(j, group.shared + int(t), 1) for t in np.flatnonzero(e.supervised[group.shared :])]
    return targets
