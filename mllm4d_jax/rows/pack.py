"""Where groups and their branches go in rows: plain numbers in, places out, as little padding as a quick search finds.

Groups go to rows; all rows of a batch have one shape, so what counts is the fullest prefix region and the fullest
branch region. Branches go to slots: one slot may hold several, one after the other, if they belong to different
groups. That is exact and not an approximation: a token sees its own group's prefix and what comes before it in its slot
of its own group, so neighbours from other groups do not exist for it.
"""

from __future__ import annotations

from collections.abc import Sequence


def place_branches(row: Sequence[Sequence[int]], length: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Places branches in slots of `length` tokens: longest first, each in the first slot that has room and none of the
    same group.

    Args:
      row: the lengths of the branches of each group, none above `length`.

    Returns:
      ((slot, first token in it) for each branch of each group, slots that are used).
    """
    order = sorted((-n, g, b) for g, group in enumerate(row) for b, n in enumerate(group))
    free: list[int] = []  # tokens left in each slot
    inside: list[set[int]] = []  # groups that a slot has a branch of
    placed: list[list[tuple[int, int]]] = [[(0, 0)] * len(group) for group in row]
    for negative, g, b in order:
        n, slot = -negative, 0
        while slot < len(free) and (free[slot] < n or g in inside[slot]):
            slot += 1
        if slot == len(free):
            free.append(length)
            inside.append(set())
        placed[g][b] = (slot, length - free[slot])
        free[slot] -= n
        inside[slot].add(g)
    return placed, len(free)


def spread(loads: Sequence[tuple[int, Sequence[int]]], rows: int) -> list[list[int]]:
    """Which groups each row gets: largest first, each into the row that is emptiest so far; then pairs of groups change
    places as long as that makes the rows' common shape smaller.

    Ties go to what comes first, so the result depends on the arguments alone. Rows may stay empty.

    Args:
      loads: tokens of each group's prefix, and of each of its branches.
    """
    sizes = [prefix + sum(branches) for prefix, branches in loads]
    packed: list[list[int]] = [[] for _ in range(rows)]
    filled = [0] * rows
    for i in sorted(range(len(loads)), key=lambda i: -sizes[i]):
        row = filled.index(min(filled))
        packed[row].append(i)
        filled[row] += sizes[i]
    longest = max((max(branches) for _, branches in loads), default=0)
    # A group's branches never share a slot with each other, so a row takes at least the slots of its largest group.
    needs = [(prefix, sum(branches), len(branches) * longest) for prefix, branches in loads]
    for _ in range(len(loads)):
        if not _improve(packed, needs):
            break
    return packed


def _improve(packed: list[list[int]], needs: Sequence[tuple[int, int, int]]) -> bool:
    """Makes the exchange of two groups that helps most; False when none does."""
    rows = [_need(row, needs) for row in packed]
    best, chosen = _shape(rows), None
    # Only the rows that decide the shape can make it smaller.
    for a in sorted({max(range(len(rows)), key=lambda r: rows[r][k]) for k in (0, 1)}):
        for b in range(len(packed)):
            others = [need for r, need in enumerate(rows) if r not in (a, b)]
            for i, one in enumerate(packed[a]) if b != a else ():
                for j, other in enumerate(packed[b]):
                    left = _need([*packed[a][:i], other, *packed[a][i + 1 :]], needs)
                    right = _need([*packed[b][:j], one, *packed[b][j + 1 :]], needs)
                    size = _shape([*others, left, right])
                    if size < best:
                        best, chosen = size, (a, i, b, j)
    if chosen is None:
        return False
    a, i, b, j = chosen
    packed[a][i], packed[b][j] = packed[b][j], packed[a][i]
    return True


def _need(row: Sequence[int], needs: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Tokens of the prefix region and of the branch region."""
    prefix = sum(needs[i][0] for i in row)
    return prefix, max(sum(needs[i][1] for i in row), max((needs[i][2] for i in row), default=0))


def _shape(rows: Sequence[tuple[int, int]]) -> int:
    return max(prefix for prefix, _ in rows) + max(branches for _, branches in rows)
