"""The `eval` task: asks a model the questions of a benchmark, those about a video together, and keeps every answer.

Predictions that are there already, those of a run or published ones, are scored without model and videos.

Every process asks about its own videos, on its own devices; they meet only at the end, when the first one makes the
tables. What an answer is depends on its question, the model and the seed, not on which process asks it beside what.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from mllm4d_jax import __version__
from mllm4d_jax.data.group_encoder import EncodedGroup, GroupEncoder
from mllm4d_jax.data.quarantine import Quarantine, main_reasons
from mllm4d_jax.data.reader import GroupReader
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.eval.asking import EvaluationError, ItemSource, Layout, Manner, ShuffledEncoder, share_of_host
from mllm4d_jax.eval.predictions import (
    Answers,
    Prediction,
    PredictionStore,
    config_hash,
    read_answers,
    read_predictions,
)
from mllm4d_jax.eval.questions import load_benchmark, question_files
from mllm4d_jax.eval.tables import publish
from mllm4d_jax.files.remote import is_remote
from mllm4d_jax.files.version import of_another
from mllm4d_jax.generate.completions import Completions
from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids, prompt_id
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.stream import Limits
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import batch_shards
from mllm4d_jax.qa.questions import BenchmarkQuestion
from mllm4d_jax.qa.reasoning import with_prompt
from mllm4d_jax.qa.records import as_prompt
from mllm4d_jax.report.reading import QUARANTINE
from mllm4d_jax.rows.rows import Group
from mllm4d_jax.run.build import encoder_of, row_shape
from mllm4d_jax.run.clips import check_clips
from mllm4d_jax.run.start import ModelChoice, choose_model, load_chosen
from mllm4d_jax.run.workdir import Workdir, hold_workdir, not_held, write_config

_QUIET_S = 30.0  # between two states of the progress bar where there is no terminal


class StoppedElsewhereError(EvaluationError):
    """Another process of the run could not go on."""


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task: asks what is not answered in the workdir yet, then scores everything that is.

    With `rescore.path` nothing is asked, and what that names is scored.

    Raises:
      EvaluationError: no model and nothing to score, nothing to ask, not one question that could be asked, or another
        process of the run could not finish.
      StartError, ResumeError, ModelConfigError, CheckpointError, PeftError: the model; BenchmarkError, RecordFileError:
        the questions; PredictionError, ScoringError: the predictions; QuarantineError: questions that could not be
        asked with another configuration; ProcessorError, MeshError: what asks them;
      PreflightError, LockError, StorageError: the workdir; ClipsError: other videos than those of the answers there.
    """
    if not config.rescore.path and not (config.model.path or config.model.adapter):
        raise EvaluationError(
            "model.path and rescore.path are empty: name the model to ask with --config.model.path=DIR, or predictions "
            "to score with --config.rescore.path=FILE"
        )
    if config.rescore.path:
        with hold_workdir(workdir) as held:
            publish(read_answers(config.rescore.path, config.benchmark), config, held.path)
        return 0
    # On a disk, the files of predictions have locks of their own.
    with hold_workdir(workdir) if is_remote(workdir) else contextlib.nullcontext(not_held(workdir)) as held:
        return _ask_and_score(config, held)


def _ask_and_score(config: ml_collections.ConfigDict, held: Workdir) -> int:
    """Do what `run` does without `rescore.path`, and raise the same."""
    folder = held.path
    try:
        bad = _ask_all(config, folder)
    except StoppedElsewhereError:
        raise
    except Exception:
        multihost.gather([1, 0])  # the others wait in `_agree`
        raise
    unusable = int(_agree(bad).sum())
    held.share()
    multihost.primary_only(lambda: _score(config, folder, unusable))  # of a folder in a bucket it has all files alone
    return 0


def _score(config: ml_collections.ConfigDict, folder: Path, unusable: int) -> None:
    """Score what all processes have written. Raises EvaluationError where that is nothing, and as `publish`."""
    predictions = read_predictions(folder)
    if not predictions:
        raise EvaluationError(
            f"not one of the {unusable} questions could be asked: {main_reasons(folder / QUARANTINE)}. Every one is "
            f"named with its reason in {folder / QUARANTINE}; check data.root and the reasons, and delete that file to "
            "try them again"
        )
    if unusable:
        print(f"{unusable} questions could not be asked; {folder / QUARANTINE} says why", flush=True)
    publish(Answers(predictions, unusable), config, folder)


def _agree(number: int) -> np.ndarray:
    """The number of every process, once all of them are here.

    Raises:
      StoppedElsewhereError: one of them failed on its way.
    """
    found = multihost.gather([0, number])
    if found[:, 0].any():
        raise StoppedElsewhereError(
            f"process {int(found[:, 0].argmax())} of this run could not go on, for the reason that it gives; the "
            "answers so far are kept, start the run again to go on"
        )
    return found[:, 1]


def _ask_all(config: ml_collections.ConfigDict, folder: Path) -> int:
    """Asks this process's questions; returns how many of them could not be asked, now or earlier."""
    items, manner = load_questions(config), manner_of(config)
    choice = choose_model(config.model.path, config.model.adapter, config.model.step)
    host, hosts = jax.process_index(), jax.process_count()
    digest = answers_hash(config, manner, choice)
    with PredictionStore(folder, digest, host=host) as store:
        if multihost.is_primary():
            for version in sorted(store.versions - {__version__}):
                print(of_another(f"a part of the answers in {folder}", version), flush=True)
            check_clips(folder, [ItemSource(items, manner)], fresh=not store.done)
            write_config(folder, config)
        quarantine = Quarantine(folder / QUARANTINE, 1.0, host=host, config=digest)
        mine = [i for video in share_of_host(items, (), host, hosts) for i in video]
        known = {items[i].id for i in mine if quarantine.knows(0, i)}
        left = share_of_host(items, store.done | known, host, hosts)
        asked = sum(len(video) for video in left)
        # All processes load the model or none: those that read a checkpoint do it together.
        if _agree(asked).any():
            print(f"asking {asked} of {len(items)} questions about {len(left)} videos: {choice}", flush=True)
            ask = _Asker(config, items, manner, choice, sum(-(-len(v) // config.questions_per_video) for v in left))
            with ask.encoder, progress_bar(asked) as bar:
                for predictions in ask(left, digest, quarantine, bar):
                    store.append(predictions)
                    bar.update(len(predictions))
        return sum(quarantine.knows(0, i) for i in mine)


def progress_bar(questions: int) -> tqdm:
    """Return the bar on stderr, with rate and time left; where that is no terminal it says so only now and then."""
    seconds = 0.1 if sys.stderr.isatty() else _QUIET_S
    return tqdm(total=questions, unit="question", dynamic_ncols=True, mininterval=seconds, maxinterval=_QUIET_S)


def load_questions(config: ml_collections.ConfigDict) -> tuple[BenchmarkQuestion, ...]:
    """The questions of the run, the first `limit` of them.

    Raises:
      EvaluationError: nothing to ask; and what `questions.load_benchmark` raises.
    """
    if not config.data.path:
        raise EvaluationError("data.path is empty: name the benchmark's questions with --config.data.path=FILE")
    if not config.data.root and config.control != "blind":
        raise EvaluationError("data.root is empty: name the folder of the videos with --config.data.root=DIR")
    items = load_benchmark(config.benchmark, config.data.path, config.data.root or None)
    items = items[: config.limit] if config.limit else items
    if not items:
        raise EvaluationError(f"data.path = {config.data.path} holds no questions")
    return items


def manner_of(config: ml_collections.ConfigDict) -> Manner:
    """How the config wants questions asked. Raises as `Manner.of`."""
    return Manner.of(config.prompt, config.control == "blind")


def answers_hash(config: ml_collections.ConfigDict, manner: Manner, choice: ModelChoice) -> str:
    """Hash of all that the answers depend on: files by their content, so that they may be moved."""
    sha = hashlib.sha256()
    for file in question_files(config.data.path):
        sha.update(file.name.encode() + file.read_bytes())
    content = {"data.path": sha.hexdigest(), "model.path": choice.identity(), "prompt.file": manner.system}
    return config_hash(config, content)


class _Asker:
    """The model with everything around it, on the devices of this process."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        items: Sequence[BenchmarkQuestion],
        manner: Manner,
        choice: ModelChoice,
        groups: int,
    ) -> None:
        """`groups`: rows that there are to ask, of questions about one video each."""
        self._config, self._manner = config, manner
        self._items = {item.id: item for item in items}
        self._source = ItemSource(items, manner)
        kind = functools.partial(ShuffledEncoder, seed=config.seed) if config.control == "shuffled" else Encoder
        kind = functools.partial(kind, gen_prefix=config.prompt.gen_prefix)
        self.encoder = encoder_of(choice.base, config.video, config.data.max_tokens, kind, config.model.chat_template)
        self._tokenizer = self.encoder.tokenizer
        mesh = make_mesh(dict(config.mesh), jax.local_devices())
        model = load_chosen(choice, dtype=config.model.dtype, attention=config.model.attention, mesh=mesh)
        shards, shape = batch_shards(mesh), row_shape(config, self.encoder.config, model.config)
        self._rows = max(1, min(config.prompts_at_once, groups))
        self._layout = Layout(rows=shards, per_row=config.questions_per_video, shape=shape)  # one for each device
        graphdef, state = nnx.split(model)
        self._weights = (state,)
        self._sampler = Sampler(graphdef, mesh, chunk=config.chunk, ladder=Ladder(shards=shards))
        self._options = SamplingOptions(
            temperature=config.temperature,
            eos_ids=self._tokenizer.eos_ids,
            banned_ids=banned_token_ids(self._tokenizer, model.config.text.vocab_size),
        )

    def __call__(
        self, videos: Sequence[tuple[int, ...]], digest: str, quarantine: Quarantine, bar: tqdm
    ) -> Iterator[list[Prediction]]:
        """Yields the predictions of one row of questions after the other; what cannot be asked goes to quarantine."""
        asked: dict[int, tuple[Group, list[str]]] = {}
        encoder = GroupEncoder([self._source], self.encoder, cache_bytes=0, as_prompt=as_prompt)
        questions, ahead = [Questions(0, numbers) for numbers in videos], 2 * self._rows
        with GroupReader(questions, encoder, workers=self._config.data.workers, ahead=ahead) as reader:
            stream = self._sampler.stream(
                self._weights,
                self._prompts(_groups(reader, self._layout, quarantine, bar), asked),
                options=self._options,
                seed=self._config.seed,
                limits=Limits(self._rows),
            )
            for number, out in stream:
                if number in asked:  # else a row that only fills up
                    yield self._predictions(*asked.pop(number), out, digest)

    def _prompts(self, groups: Iterator[Group], asked: dict[int, tuple[Group, list[str]]]) -> Iterator[Prompts]:
        """Rows as the sampler takes them; `asked` gets each one's group with the key of the question in each slot."""
        numbers_of_rows = itertools.count()
        while some := list(itertools.islice(groups, self._layout.rows)):
            inputs, keys = self._layout.collate(some)
            for one in zip(some, keys, strict=False):
                asked[next(numbers_of_rows)] = one
            numbers = [[prompt_id(key) for key in row] for row in keys]
            yield Prompts.checked(inputs, numbers, inputs.layout.slots, self._config.max_new_tokens)

    def _predictions(self, group: Group, keys: Sequence[str], out: Completions, digest: str) -> list[Prediction]:
        begun = self._config.prompt.gen_prefix  # by us, and part of the response
        prompts = {example.key: example.text.removesuffix(begun) for example in group.examples}
        return [
            Prediction.of(
                self._items[key],
                with_prompt(prompts[key], begun + self._tokenizer.decode(out.ids(0, slot))),
                prompt_mode=self._manner.mode,
                control=self._config.control,
                config=digest,
                tokens=int(out.lengths[0, slot]),
                finish=out.finish_reason[0][slot],
            )
            for slot, key in enumerate(keys)
            if key
        ]


def _groups(reader: Iterable[EncodedGroup], layout: Layout, quarantine: Quarantine, bar: tqdm) -> Iterator[Group]:
    """The rows of one video after the other."""
    for encoded in reader:
        for i, error in encoded.errors.items():
            quarantine.add(0, i, error)
        bar.total -= len(encoded.errors)
        if encoded.examples:
            yield from layout.groups(encoded.examples)
