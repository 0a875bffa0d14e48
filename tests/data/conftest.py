"""What the loader's tests share."""

from __future__ import annotations

import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import Loader
from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.data.stream import GroupStream, LoaderOptions
from tests.data.fakes import SHAPE, FakeEncoder, write_records


@pytest.fixture
def make_loader(tmp_path):
    made = []

    def make(
        *files,
        position=0,
        seed=0,
        rate=0.5,
        rejected=0,
        fresh=False,
        encoder=None,
        rates=None,
        host=0,
        hosts=1,
        **options,
    ):
        sources = [
            RecordFile(write_records(tmp_path / f"r{n or ''}.json", entries), tmp_path)
            for n, entries in enumerate(files)
        ]
        options = LoaderOptions(**({"batch_size": 3, "seed": seed, "host": host, "hosts": hosts} | options))
        quarantine = Quarantine(
            tmp_path / "quarantine.jsonl",
            rate,
            rejected=rejected,
            fresh=fresh,
            host=host,
            per_group=options.questions_per_video,
        )
        mixture = Mixture(sources, rates or [1.0] * len(sources))
        group_encoder = GroupEncoder(sources, encoder or FakeEncoder())
        made.append(GroupStream(mixture, group_encoder, quarantine, options, position))
        return Loader(made[-1], SHAPE)

    yield make
    for stream in made:
        stream.close()
