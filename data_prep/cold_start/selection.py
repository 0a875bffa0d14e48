"""Which reasoning paths are kept and written: Algorithm 1 of MLLM-4D (arXiv 2603.00515), given the rewards.

Per scenario the threshold is the mean, over the questions, of the reward of each question's best path. The paper's text
keeps a question if its best path reaches the threshold ("best_of_sample"); its pseudocode keeps every path that does
("every_path"); "no_filter" keeps all that earn a reward, for paths that hardly differ. A question without a usable path
has no best path and is not part of the mean: as a zero it would lower the threshold for all others.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from data_prep.cold_start.r1_items import R1Question
from data_prep.store.export import MANIFEST, RecordWriter
from data_prep.store.parts import ClipResult, PartStore
from mllm4d_jax.files.atomic import remove_partials, write_atomic
from mllm4d_jax.qa.system_prompt import ST_COT

RECORDS, REJECTED = "cold_start.json", "cold_start_rejected.jsonl"
FORMAT = 1
_ROUNDING = 1e-9  # rewards that differ by less are equal: a mean of equal rewards may come out one bit higher

Rewards = Sequence[tuple[int, float]]  # (path number, reward) of a question's usable paths, the numbers ascending


def draw_order(ids: Iterable[str], seed: int) -> list[str]:
    """Return the ids in an order that depends on seed and ids alone; the first n are a random draw without replacement,
    and part of any larger one."""
    return sorted(ids, key=lambda key: (hashlib.sha256(f"{seed}\0{key}".encode()).digest(), key))


def threshold(questions: Iterable[Rewards]) -> float | None:
    """Return the mean reward of the questions' best paths; None if no question has a usable path."""
    best = [max(reward for _, reward in rewards) for rewards in questions if rewards]
    return statistics.fmean(best) if best else None


def passing(rewards: Rewards, tau: float | None, how: str) -> list[int]:
    """Return the numbers of a question's paths that the filter keeps, the best first, of equal ones the first.

    Args:
      tau: the threshold; None only without usable paths.
      how: "best_of_sample", "every_path" or "no_filter". A path of reward 0 never passes.
    """
    good = [(n, reward) for n, reward in rewards if reward > 0 and (how == "no_filter" or reward >= tau - _ROUNDING)]
    good.sort(key=lambda entry: (-entry[1], entry[0]))
    return [path for path, _ in (good[:1] if how == "best_of_sample" else good)]


def shares(scenarios: Iterable[str], total: int) -> dict[str, int]:
    """Return `total` in equal parts; what is left over goes to the first scenarios by name, one each."""
    names = sorted(scenarios)
    each, rest = divmod(total, len(names)) if names else (0, 0)
    return {name: each + (n < rest) for n, name in enumerate(names)}


def take(kept: Mapping[str, Sequence[int]], limit: int | None) -> set[tuple[str, int]]:
    """Return at most `limit` (question id, path number) of one scenario.

    Args:
      kept: question id -> what `passing` gave, in the order of the draw. Every question gives its first path before any
        gives its second.
      limit: None for all.
    """
    rounds = max((len(paths) for paths in kept.values()), default=0)
    ordered = [(key, paths[n]) for n in range(rounds) for key, paths in kept.items() if n < len(paths)]
    return set(ordered if limit is None else ordered[:limit])


def write_selection(
    store: PartStore,
    drawn: Mapping[str, Sequence[R1Question]],
    available: Mapping[str, int],
    settings: ml_collections.ConfigDict,
    folder: Path,
) -> dict[str, Any]:
    """Filter and balance what the teacher wrote, write all files, the manifest last, and return it.

    With a total, every scenario is to give an equal share; one that passes fewer gives those, and no other fills in,
    because the data would be out of balance.

    Args:
      drawn: scenario -> its questions, in the order of the draw.
      available: scenario -> how many questions there were to draw from.
      settings: filter, total and per_scenario of the config group `cold_start`.
    """
    share = shares(drawn, settings.total)
    taken: set[tuple[str, int]] = set()
    scenarios: dict[str, dict[str, Any]] = {}
    for name in sorted(drawn):
        rewards = {item.id: _rewards(store.read(item.id)) for item in drawn[name]}
        chosen, figures = _choose(rewards, share[name] if settings.total else None, settings.filter)
        taken |= chosen
        scenarios[name] = {"available": available[name], **figures}
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_partials(folder)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    with RecordWriter(folder / RECORDS) as records, RecordWriter(folder / REJECTED) as rejected:
        for item in sorted((item for group in drawn.values() for item in group), key=lambda item: item.id):
            result = store.read(item.id)
            rows = [row for row in result.rows if (item.id, row["path"]) in taken]
            for row in rows:
                suffix = "" if settings.filter == "best_of_sample" else f"/path{row['path']}"
                records.write(record(item, row["completion"], f"{item.id}{suffix}"))
            if not rows:
                entry = rejection(item, result, scenarios[item.scenario]["tau"], settings.filter)
                reasons[item.scenario].update(entry["reasons"])
                rejected.write(entry)
    for name, entry in scenarios.items():
        entry["rejected"] = dict(reasons[name])
    manifest = {
        "format": FORMAT,
        "seed": store.seed,
        "config": store.config | {key: settings[key] for key in ("filter", "total", "per_scenario")},
        "scenarios": scenarios,
        "files": {RECORDS: records.summary(), REJECTED: rejected.summary()},
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / MANIFEST, f"{text}\n".encode())
    return manifest


def _choose(
    rewards: Mapping[str, Rewards], wanted: int | None, rule: str
) -> tuple[set[tuple[str, int]], dict[str, Any]]:
    """(question id, path number) of what is kept of one scenario, at most `wanted`, and its figures."""
    tau = threshold(rewards.values())
    kept = {key: paths for key, own in rewards.items() if (paths := passing(own, tau, rule))}
    chosen = take(kept, wanted)
    written = {(key, path): reward for key, own in rewards.items() for path, reward in own}
    kept_rewards = [reward for path, reward in written.items() if path in chosen]
    return chosen, {
        "drawn": len(rewards),
        "answered": sum(map(bool, rewards.values())),
        "tau": tau,
        "passed": sum(map(len, kept.values())),  # paths, as "kept"
        "wanted": wanted,
        "kept": len(chosen),
        "mean_reward": statistics.fmean(written.values()) if written else None,
        "mean_reward_kept": statistics.fmean(kept_rewards) if kept_rewards else None,
    }


def _rewards(result: ClipResult) -> Rewards:
    return [(row["path"], row["rewards"]["total"]) for row in result.rows]


def record(item: R1Question, completion: str, record_id: str) -> dict[str, Any]:
    """Return a record as in MLLM4D-Cold-Start-Data.json, plus "id", "question_type" and, where it is known, "scale",
    which its readers ignore.

    The speaker is "user", not "human": the released loader takes every role but user and system for the assistant.
    """
    turns = (("system", item.system or ST_COT), ("user", item.prompt), ("gpt", completion))
    return {
        "id": record_id,
        "video": item.video,
        **dict(zip(("video_start", "video_end"), item.span or (), strict=False)),
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "question_type": item.scenario,
        **({"scale": item.scale} if item.scale else {}),
    }


def rejection(item: R1Question, result: ClipResult, tau: float | None, rule: str) -> dict[str, Any]:
    """Return why a question gave no record: its own problems, "below_threshold", "no_reward", or "not_needed" (it
    passed, but the scenario's share was full). Rewards are (path number, total)."""
    rewards = _rewards(result)
    reasons = sorted({entry["reason"] for entry in result.rejected})
    if rewards:
        passed, best = passing(rewards, tau, rule), max(reward for _, reward in rewards)
        reasons.append("not_needed" if passed else "below_threshold" if best > 0 else "no_reward")
    details = [entry["detail"] for entry in result.rejected]
    return {"id": item.id, "scenario": item.scenario, "reasons": reasons, "rewards": rewards, "details": details}


def print_selection(manifest: Mapping[str, Any]) -> None:
    """Print a line per scenario, and one for each that falls short of what was asked."""
    wanted_draw = manifest["config"]["per_scenario"]
    for name, entry in manifest["scenarios"].items():
        tau = "-" if entry["tau"] is None else f"{entry['tau']:.4f}"
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(entry["rejected"].items())) or "none"
        print(
            f"{name}: {entry['drawn']} drawn, {entry['answered']} answered, threshold {tau}, "
            f"{entry['kept']} paths kept; rejected: {reasons}"
        )
        if entry["drawn"] < wanted_draw:
            print(f"  short: there are only {entry['available']} questions of the {wanted_draw} to draw")
        if entry["wanted"] is not None and entry["kept"] < entry["wanted"]:
            print(f"  short: {entry['kept']} of {entry['wanted']} paths; draw more questions (cold_start.per_scenario)")
