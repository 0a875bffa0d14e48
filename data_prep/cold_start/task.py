"""Cold-start data, Algorithm 1 of MLLM-4D (arXiv 2603.00515): reasoning for a draw of R1 questions, kept by reward.

A teacher writes several reasoning paths per question, the reward of the later reinforcement learning judges them, and
`path_filter` says which are kept. The unit of resumable work is a question (`parts.PartStore`); what is kept is decided
afterwards from all of them, so another filter or total costs no new path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_collections
from tqdm import tqdm

from configs.schema import fixed
from configs.tables.curation import REASONING_KEYS
from data_prep.cold_start import oracle
from data_prep.cold_start.path_filter import Sample, draw_order, passing, shares, take, threshold
from data_prep.cold_start.prompt import completion_of, item_frames, path_problem, path_request
from data_prep.cold_start.r1_items import R1Question, read_items
from data_prep.store.export import MANIFEST, RecordWriter
from data_prep.store.parts import ClipRejected, ClipResult, PartStore
from data_prep.teacher.client import ReplyError, Teacher, TeacherError
from data_prep.teacher.config import ENDPOINT, ORACLE, open_teacher
from mllm4d_jax.files.atomic import remove_partials, write_atomic
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import resolve_media
from mllm4d_jax.qa.rewards import RewardWeights, resolve_weights, score
from mllm4d_jax.qa.system_prompt import ST_COT

RECORDS, REJECTED = "cold_start.json", "cold_start_rejected.jsonl"
FORMAT = 1
NO_REPLY = "no_reply"
# raises ClipRejected or RecordError for a question that gets no paths
WritePaths = Callable[[R1Question], Sequence[str]]


class ColdStartError(ValueError):
    """The settings or the records cannot give cold-start data."""


@dataclasses.dataclass(frozen=True)
class OracleTeacher:
    """Composes `paths` completions per question; see `oracle.compose`."""

    paths: int
    seed: int

    def __call__(self, item: R1Question) -> list[str]:
        return [oracle.compose(item, path, self.seed) for path in range(self.paths)]


@dataclasses.dataclass(frozen=True)
class ModelTeacher:
    """Has `paths` completions per question written by a model that sees frames of the video.

    Attributes:
      teacher: answers requests; without an endpoint, from stored replies.
      pool: decodes the videos.
      root: media root.
      model, temperature, seed: of the requests; every path has a seed of its own.
      num_frames: most frames sent.
    """

    teacher: Teacher
    pool: DecodePool
    root: Path
    model: str
    paths: int
    temperature: float
    num_frames: int
    seed: int

    def __call__(self, item: R1Question) -> list[str]:
        """One failed path rejects the question: the best of fewer paths would lower the threshold.

        Raises:
          ClipRejected: "bad_reply" (the model does not reply in the form), "no_reply" (none is stored, offline).
          RecordError: the video cannot be used.
          TeacherError: the endpoint or the settings are wrong; no question would fare better.
        """
        frames, numbers = item_frames(item, resolve_media(self.root, item.video), self.num_frames, self.pool)
        written = []
        for path in range(self.paths):
            digest = hashlib.sha256(f"{self.seed}\0{path}".encode()).digest()
            seed = int.from_bytes(digest[:4], "big") >> 1  # 31 bits: what endpoints take
            request = path_request(item, frames, numbers, self.model, self.temperature, seed)
            try:
                written.append(completion_of(self.teacher.ask(request), item.solution.answer))
            except ReplyError as error:
                raise ClipRejected("bad_reply", f"path {path}: {error}", item.source_id) from error
            except TeacherError as error:
                if self.teacher.endpoint is None:
                    raise ClipRejected(NO_REPLY, f"path {path}: {error}", item.source_id) from error
                raise
        return written


def judge(item: R1Question, write: WritePaths, root: Path, weights: RewardWeights) -> ClipResult:
    """All paths of one question: rows {"path", "completion", "rewards"}; unusable ones with reason and detail.

    A question rejected for something that can be repaired outside of it (its video, a stored reply that is missing) is
    marked "again": the next run tries it again.
    """
    rows, rejected = [], []
    try:
        resolve_media(root, item.video)
        for path, completion in enumerate(write(item)):
            problem = path_problem(completion)
            if problem:
                rejected.append({"reason": problem[0], "detail": problem[1], "path": path})
            else:
                rewards = score(completion, item.solution, weights)
                rows.append({"path": path, "completion": completion, "rewards": rewards})
    except ClipRejected as error:
        rows, rejected = [], [{"reason": error.reason, "detail": error.detail, "again": error.reason == NO_REPLY}]
    except RecordError as error:
        rows, rejected = [], [{"reason": error.reason, "detail": error.message, "again": True}]
    return ClipResult(item.id, item.source_id, "train", tuple(rows), tuple(rejected))


def judge_all(
    items: Sequence[R1Question],
    work: Callable[[R1Question], ClipResult],
    store: PartStore,
    *,
    threads: int,
    progress: bool,
) -> int:
    """Stores a result for every item that has none, or one to be tried again; returns how many were done now.

    Whatever `work` raises ends the run; what was finished by then, in other threads too, is kept.
    """
    pending = [item for item in items if not _settled(store, item.id)]
    todo, running = iter(pending), set[Future]()
    bar = tqdm(total=len(items), initial=len(items) - len(pending), unit="question", disable=not progress)
    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(running) < 2 * threads and (item := next(todo, None)) is not None:
                    running.add(pool.submit(work, item))
                if not running:
                    return len(pending)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    store.write(future.result())
                    running.discard(future)
                    bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in running:
                if future.done() and not future.cancelled() and future.exception() is None:
                    store.write(future.result())
            raise


def _settled(store: PartStore, key: str) -> bool:
    return store.has(key) and not any(entry.get("again") for entry in store.read(key).rejected)


def run_cold_start(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Writes cold_start.json, cold_start_rejected.jsonl and manifest.json into the workdir.

    Started again, a run tries questions whose video or stored reply was missing; other rejections stay.

    Raises:
      ColdStartError: settings that cannot work, or not one path passed. RecordError: the records. TeacherError: the
        endpoint. StoreError: the workdir holds another run's results.
    """
    settings, weights = config.cold_start, check_settings(config.cold_start)
    items, repeated = read_items(settings.records)
    if repeated:
        print(f"{repeated} records occur more than once and count once")
    drawn = draw(items, settings.per_scenario, config.seed)
    root = Path(settings.root) if settings.root else Path(settings.records).absolute().parent
    folder = Path(workdir)
    with open(settings.records, "rb") as file:
        made_with = {"records": hashlib.file_digest(file, "sha256").hexdigest()}
    made_with |= fixed(config, REASONING_KEYS)
    with ExitStack() as stack:
        store = stack.enter_context(PartStore(folder, seed=config.seed, config=made_with))
        pool = stack.enter_context(DecodePool(config.decode_timeout_s))
        write = path_writer(config, root, folder, pool)
        chosen = [item for group in drawn.values() for item in group]
        threads = config.teacher.concurrency if config.teacher.kind == ENDPOINT else 1
        done = judge_all(chosen, lambda item: judge(item, write, root, weights), store, threads=threads, progress=True)
        print(f"{done} questions done now, {len(chosen)} in all")
        manifest = select(store, drawn, Counter(item.scenario for item in items), settings, folder, made_with)
    report(manifest)
    if not manifest["files"][RECORDS]["records"]:
        raise ColdStartError(f"not one path passed; {folder / REJECTED} has the reason for every question")
    print(f"records: {folder / RECORDS}; media root: {root}")
    return 0


def check_settings(settings: ml_collections.ConfigDict) -> RewardWeights:
    """The reward's weights. Raises ColdStartError for settings that cannot work."""
    if not settings.records:
        raise ColdStartError("cold_start.records is empty: give a JSONL file in the layout of MLLM4D-R1-30k.jsonl")
    try:
        return resolve_weights(settings.reward)
    except ValueError as error:
        raise ColdStartError(f"cold_start.reward: {error}") from error


def draw(items: Sequence[R1Question], per_scenario: int, seed: int) -> dict[str, list[R1Question]]:
    """scenario -> at most `per_scenario` of its items, in the order of the draw."""
    groups: dict[str, dict[str, R1Question]] = defaultdict(dict)
    for item in items:
        groups[item.scenario][item.id] = item
    return {name: [group[key] for key in draw_order(group, seed)[:per_scenario]] for name, group in groups.items()}


def path_writer(config: ml_collections.ConfigDict, root: Path, folder: Path, pool: DecodePool) -> WritePaths:
    """The configured teacher. Raises TeacherError without a model's name or an endpoint's address."""
    teacher, paths = config.teacher, config.cold_start.paths
    if teacher.kind == ORACLE:
        return OracleTeacher(paths, config.seed)
    return ModelTeacher(
        open_teacher(teacher, folder),
        pool,
        root,
        model=teacher.model,
        paths=paths,
        temperature=teacher.temperature,
        num_frames=teacher.num_frames,
        seed=config.seed,
    )


def select(
    store: PartStore,
    drawn: Mapping[str, Sequence[R1Question]],
    available: Mapping[str, int],
    settings: ml_collections.ConfigDict,
    folder: Path,
    made_with: Mapping[str, Any],
) -> dict[str, Any]:
    """Filters and balances what the teacher wrote, writes all files, the manifest last, and returns it.

    With a total, every scenario is to give an equal share; one that passes fewer gives those, and no other fills in,
    because the data would be out of balance.
    """
    share = shares(drawn, settings.total)
    taken: dict[str, dict[int, str]] = defaultdict(dict)  # question id -> {path: its record's id}
    facts = {}
    for name in sorted(drawn):
        samples = [_sample(store.read(item.id)) for item in drawn[name]]
        tau = threshold(samples)
        kept = {} if tau is None else {s.id: p for s in samples if (p := passing(s, tau, settings.filter))}
        for key, path in take(kept, share[name] if settings.total else None):
            taken[key][path] = key if settings.filter == "best_of_sample" else f"{key}/path{path}"
        facts[name] = _facts(samples, tau, kept, taken) | {
            "available": available[name],
            "wanted": share[name] if settings.total else None,
        }
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_partials(folder)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    with RecordWriter(folder / RECORDS) as records, RecordWriter(folder / REJECTED) as rejected:
        for item in sorted((item for group in drawn.values() for item in group), key=lambda item: item.id):
            result, paths = store.read(item.id), taken.get(item.id, {})
            for row in result.rows:
                if row["path"] in paths:
                    records.write(record(item, row["completion"], paths[row["path"]]))
            if not paths:
                entry = rejection(item, result, facts[item.scenario]["tau"])
                reasons[item.scenario].update(entry["reasons"])
                rejected.write(entry)
    for name, found in facts.items():
        found["rejected"] = dict(reasons[name])
    files = {RECORDS: records.summary(), REJECTED: rejected.summary()}
    chosen = {"filter": settings.filter, "total": settings.total, "per_scenario": settings.per_scenario}
    config = dict(made_with) | chosen
    manifest = {"format": FORMAT, "seed": store.seed, "config": config, "scenarios": facts, "files": files}
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / MANIFEST, f"{text}\n".encode())
    return manifest


def _sample(result: ClipResult) -> Sample:
    return Sample(result.clip_id, tuple((row["path"], row["rewards"]["total"]) for row in result.rows))


def _facts(
    samples: Sequence[Sample],
    tau: float | None,
    kept: Mapping[str, Sequence[int]],
    taken: Mapping[str, Mapping[int, str]],
) -> dict[str, Any]:
    """What the manifest says about a scenario; passed and kept count paths."""
    rewards = [reward for sample in samples for _, reward in sample.rewards]
    chosen = [reward for sample in samples for path, reward in sample.rewards if path in taken.get(sample.id, {})]
    return {
        "drawn": len(samples),
        "answered": sum(bool(sample.rewards) for sample in samples),
        "tau": tau,
        "passed": sum(map(len, kept.values())),
        "kept": len(chosen),
        "mean_reward": _mean(rewards),
        "mean_reward_kept": _mean(chosen),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def record(item: R1Question, completion: str, record_id: str) -> dict[str, Any]:
    """A record as in MLLM4D-Cold-Start-Data.json, plus "id" and "question_type", which its readers ignore.

    The speaker is "user", not "human": the released loader takes every role but user and system for the assistant.
    """
    turns = (("system", item.system or ST_COT), ("user", item.prompt), ("gpt", completion))
    return {
        "id": record_id,
        "video": item.video,
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "question_type": item.scenario,
    }


def rejection(item: R1Question, result: ClipResult, tau: float | None) -> dict[str, Any]:
    """Why a question gave no record: its own problems, "below_threshold", "no_reward", or "not_needed" (it passed, but
    the scenario's share was full). Rewards are (path number, total)."""
    rewards = [[row["path"], row["rewards"]["total"]] for row in result.rows]
    reasons = sorted({entry["reason"] for entry in result.rejected})
    if rewards:
        best = max(reward for _, reward in rewards)
        passed = passing(_sample(result), tau, "best_of_sample")
        reasons.append("not_needed" if passed else "below_threshold" if best > 0 else "no_reward")
    details = [entry["detail"] for entry in result.rejected]
    return {"id": item.id, "scenario": item.scenario, "reasons": reasons, "rewards": rewards, "details": details}


def report(manifest: Mapping[str, Any]) -> None:
    """Prints a line per scenario, and one for each that falls short of what was asked."""
    wanted_draw = manifest["config"]["per_scenario"]
    for name, found in manifest["scenarios"].items():
        tau = "-" if found["tau"] is None else f"{found['tau']:.4f}"
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(found["rejected"].items())) or "none"
        print(
            f"{name}: {found['drawn']} drawn, {found['answered']} answered, threshold {tau}, "
            f"{found['kept']} paths kept; rejected: {reasons}"
        )
        if found["drawn"] < wanted_draw:
            print(f"  short: there are only {found['available']} questions of the {wanted_draw} to draw")
        if found["wanted"] is not None and found["kept"] < found["wanted"]:
            print(f"  short: {found['kept']} of {found['wanted']} paths; draw more questions (cold_start.per_scenario)")
