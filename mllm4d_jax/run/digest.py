"""Digests of what a config's paths point at, so that the content counts and not the place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from mllm4d_jax.data.sources import Mixture, RecordSource

_SAMPLED = 1 << 20  # bytes read at either end of a large file
_MODEL_FILES = ("config.json", "tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json")


def content_digests(model: str | Path, records: Mixture, held_out: RecordSource | None = None) -> Mapping[str, str]:
    """Return digests of what must be the same again when a run is resumed, by config key."""
    digests = {
        "model.path": model_digest(model),
        "data.path": records.digest,
        "prompt.system": hashlib.sha256(records.system_prompt.encode()).hexdigest(),
    }
    return digests if held_out is None else digests | {"data.eval_path": held_out.digest}


def model_digest(folder: str | Path) -> str:
    """Return the digest of a model folder: config and tokenizer whole, weights sampled."""
    sha = hashlib.sha256()
    for name in _MODEL_FILES:
        file = Path(folder) / name
        sha.update(name.encode() + (file.read_bytes() if file.is_file() else b""))
    _add_sampled(sha, Path(folder), sorted(Path(folder).glob("*.safetensors")))
    return sha.hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Return the digest of all files below a folder, sampled: the same wherever the folder is moved."""
    sha = hashlib.sha256()
    _add_sampled(sha, Path(folder), sorted(p for p in Path(folder).rglob("*") if p.is_file()))
    return sha.hexdigest()


def _add_sampled(sha: hashlib._Hash, folder: Path, files: Iterable[Path]) -> None:
    """Add name, size and a mebibyte at either end of each file."""
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
        with file.open("rb") as f:
            sha.update(f.read(_SAMPLED))
            f.seek(max(0, size - _SAMPLED))
            sha.update(f.read(_SAMPLED))
