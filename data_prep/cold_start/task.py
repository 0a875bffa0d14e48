"""Cold-start data, Algorithm 1 of MLLM-4D (arXiv 2603.00515): reasoning for a draw of R1 questions, kept by reward.

A teacher writes several reasoning paths per question, the reward of the later reinforcement learning judges them, and
`selection` says which are kept. The unit of resumable work is a question (`parts.PartStore`); what is kept is decided
afterwards from all of them, so another filter or total costs no new path.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import ml_collections
from tqdm import tqdm

from configs.schema import fixed
from configs.tables.curation import REASONING_KEYS
from data_prep.cold_start import oracle
from data_prep.cold_start.prompt import completion_of, item_frames, path_problem, path_request
from data_prep.cold_start.r1_items import R1Question, read_items
from data_prep.cold_start.selection import RECORDS, REJECTED, draw_order, print_selection, write_selection
from data_prep.store.parts import ClipRejected, ClipResult, PartStore, media_rejection
from data_prep.teacher.client import ENDPOINT, ORACLE, ReplyError, Teacher, open_teacher
from data_prep.teacher.endpoint import TeacherError
from mllm4d_jax.files.cache import ClipCache, copied_file
from mllm4d_jax.files.remote import absolute
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.fetched import on_disk
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import resolve_media
from mllm4d_jax.qa.rewards import RewardWeights, resolve_weights, score
from mllm4d_jax.qa.system_prompt import resolve_system_prompt

NO_REPLY = "no_reply"
WritePaths = Callable[
    [R1Question], Sequence[str]
]  # raises ClipRejected or RecordError for a question that gets no paths


class ColdStartError(ValueError):
    """The settings or the records cannot give cold-start data."""


def run_cold_start(
    config: ml_collections.ConfigDict, workdir: str | Path, named: Callable[[Path], object] = lambda path: path
) -> int:
    """Write cold_start.json, cold_start_rejected.jsonl and manifest.json into the workdir.

    `named`: what messages call a file.

    Started again, a run tries questions whose video or stored reply was missing; other rejections stay.

    Raises:
      ColdStartError: settings that cannot work, or not one path passed. ProcessorError: the system prompt's file.
        RecordError: the records. TeacherError: the endpoint. StoreError: the workdir holds another run's results.
    """
    settings, teacher = config.cold_start, config.teacher
    if not settings.records:
        raise ColdStartError("cold_start.records is empty: give a JSONL file in the layout of MLLM4D-R1-30k.jsonl")
    try:
        weights = resolve_weights(settings.reward)
    except ValueError as error:
        raise ColdStartError(f"cold_start.reward: {error}") from error
    system = resolve_system_prompt(file=settings.system_file)
    try:
        records = copied_file(settings.records)
    except FileNotFoundError:
        raise ColdStartError(f"cold_start.records = {settings.records}: there is no such file") from None
    items, repeated = read_items(records)
    items = [item if item.system or not system else dataclasses.replace(item, system=system) for item in items]
    if repeated:
        print(f"{repeated} records occur more than once and count once")
    drawn = draw(items, settings.per_scenario, config.seed)
    root = settings.root or absolute(settings.records).rpartition("/")[0]
    folder = Path(workdir)
    with open(records, "rb") as file:
        made_with = {"records": hashlib.file_digest(file, "sha256").hexdigest(), "system": system}
    made_with |= fixed(config, REASONING_KEYS)
    with ExitStack() as stack:
        store = stack.enter_context(PartStore(folder, seed=config.seed, config=made_with))
        pool = stack.enter_context(DecodePool(config.decode_timeout_s))
        write = path_writer(config, root, folder, pool)
        chosen = [item for group in drawn.values() for item in group]
        threads = teacher.concurrency if teacher.kind == ENDPOINT else 1
        done = judge_all(chosen, lambda item: judge(item, write, root, weights), store, threads)
        print(f"{done} questions done now, {len(chosen)} in all")
        manifest = write_selection(store, drawn, Counter(item.scenario for item in items), settings, folder)
    print_selection(manifest)
    if not manifest["files"][RECORDS]["records"]:
        raise ColdStartError(f"not one path passed; {named(folder / REJECTED)} has the reason for every question")
    print(f"records: {named(folder / RECORDS)}; media root: {root}")
    return 0


def draw(items: Sequence[R1Question], per_scenario: int, seed: int) -> dict[str, list[R1Question]]:
    """Return scenario -> at most `per_scenario` of its items, in the order of the draw."""
    groups: dict[str, dict[str, R1Question]] = defaultdict(dict)
    for item in items:
        groups[item.scenario][item.id] = item
    return {name: [group[key] for key in draw_order(group, seed)[:per_scenario]] for name, group in groups.items()}


def path_writer(config: ml_collections.ConfigDict, root: str, folder: Path, pool: DecodePool) -> WritePaths:
    """Return what writes a question's paths: the configured teacher.

    Raises:
      TeacherError: no model's name, or no endpoint's address.
    """
    paths, seed = config.cold_start.paths, config.seed
    if config.teacher.kind == ORACLE and config.cold_start.style == "brief":
        return lambda item: [oracle.compose_brief(item)]  # every path would be the same
    if config.teacher.kind == ORACLE:
        return lambda item: [oracle.compose(item, path, seed) for path in range(paths)]
    return functools.partial(model_paths, config, open_teacher(config.teacher, folder), root, pool)


def model_paths(
    config: ml_collections.ConfigDict, teacher: Teacher, root: str, pool: DecodePool, item: R1Question
) -> list[str]:
    """Return completions written by a model that sees frames of the video.

    One failed path rejects the question: the best of fewer paths would lower the threshold.

    Raises:
      ClipRejected: "bad_reply" (the model does not reply in the form), "no_reply" (none is stored, offline).
      RecordError: the video cannot be used.
      TeacherError: the endpoint or the settings are wrong; no question would fare better.
    """
    settings, written = config.teacher, []
    with on_disk(resolve_media(root, item.video), ClipCache()) as video:
        frames, numbers = item_frames(item, video, settings.num_frames, pool)
    for path in range(config.cold_start.paths):
        digest = hashlib.sha256(f"{config.seed}\0{path}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big") >> 1  # 31 bits: what endpoints take
        request = path_request(item, frames, numbers, settings.model, settings.temperature, seed)
        try:
            written.append(completion_of(teacher.ask(request), item.solution.answer))
        except TeacherError as error:
            reason = "bad_reply" if isinstance(error, ReplyError) else NO_REPLY
            if reason == NO_REPLY and teacher.endpoint is not None:
                raise
            raise ClipRejected(reason, f"path {path}: {error}", item.source_id, again=reason == NO_REPLY) from error
    return written


def judge(item: R1Question, write: WritePaths, root: str, weights: RewardWeights) -> ClipResult:
    """Return all paths of one question: rows {"path", "completion", "rewards"}; unusable ones with reason and detail.

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
        rows, rejected = [], [error.entry()]
    except RecordError as error:
        rows, rejected = [], [media_rejection(error)]
    return ClipResult(item.id, item.source_id, "train", tuple(rows), tuple(rejected))


def judge_all(
    items: Sequence[R1Question], work: Callable[[R1Question], ClipResult], store: PartStore, threads: int
) -> int:
    """Store a result for every item that has none, or one to be tried again; return how many were done now.

    Whatever `work` raises ends the run; what was begun by then, in other threads too, is finished and kept.
    """
    pending = [item for item in items if not store.settled(item.id)]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(lambda item: store.write(work(item)), item) for item in pending]
        try:
            done = len(items) - len(pending)
            for future in tqdm(as_completed(futures), total=len(items), initial=done, unit="question"):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return len(pending)
