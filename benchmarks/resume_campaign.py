"""Interrupts tiny training runs in several ways, lets them go on, and compares where they end with an unbroken run.

python benchmarks/resume_campaign.py [--kills=10] [--steps=48] [--devices=8] [--only=kill] [--workdir=DIR]

Every run is a process of its own (`run.py`). `kill`: ended with SIGKILL at random moments, as often as asked; `term`:
asked to stop with SIGTERM once; `mesh`: killed once it has a checkpoint and continued from that with another device
mesh. The first two must end in the same bits as the unbroken run, parameters and optimiser; the last in the same losses
to 1e-6. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs import sft as sft_config
from data_prep.sample import write_sample_world
from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.run.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
EVERY = 4  # steps between checkpoints
KINDS = ("kill", "term", "mesh")
TOLERANCE = 1e-6  # of losses on another mesh, relative


class CampaignError(RuntimeError):
    """A run ended otherwise than it should."""


class Campaign:
    """The runs of one campaign, below one folder."""

    def __init__(self, folder: Path, steps: int, devices: int, seed: int) -> None:
        self.folder, self.steps, self.devices, self.rng = folder, steps, devices, random.Random(seed)
        records = write_sample_world(folder / "world", seed=0, clips=4)
        write_tiny_model(folder / "model", [records.read_text()], seed=0)
        config = sft_config.get_config("tiny")
        config.data.sample = ""
        config.model.path, config.data.path, config.data.root = str(folder / "model"), str(records), str(records.parent)
        config.data.prefix_buckets, config.data.branch_buckets = (256, 512), (128, 160)
        config.lora.dropout, config.video.num_frames = 0.1, 4
        config.train.batch_size = max(4, devices)
        config.train.steps, config.train.checkpoint_every, config.train.log_every = steps, EVERY, 4
        self.config = folder / "campaign_config.py"
        self.config.write_text(f"def get_config():\n    return {config.to_dict()!r}\n")

    def start(self, name: str, *more: str) -> subprocess.Popen:
        """One process of a run; a run goes on where its workdir stands."""
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        command = [sys.executable, "run.py", f"--config={self.config}", f"--workdir={self.folder / name}", *more]
        with (self.folder / f"{name}.txt").open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)

    def finish(self, name: str, *more: str) -> None:
        """Runs to the end."""
        if self.start(name, *more).wait():
            raise CampaignError(f"run '{name}' failed:\n{(self.folder / f'{name}.txt').read_text()[-3000:]}")

    def interrupt(self, name: str, number: signal.Signals, after_saving: bool = False) -> tuple[int, int]:
        """Starts a run and sends it a signal at a random moment, with `after_saving` not before its first checkpoint is
        there; (last step recorded, newest checkpoint).

        Raises:
          CampaignError: it ended before that.
        """
        target = self.saved(name) + self.rng.randint(1, EVERY + 2)
        file = self.folder / name / "metrics.jsonl"
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = self.start(name)
        while process.poll() is None and (
            not file.exists()
            or file.stat().st_mtime_ns == before
            or self.recorded(name) < min(target, self.steps - 1)
            or (after_saving and not self.saved(name))
        ):
            time.sleep(0.005)
        if after_saving and process.poll() is not None:
            raise CampaignError(f"run '{name}' ended before it could be interrupted behind a checkpoint")
        time.sleep(self.rng.random() * 0.4)  # somewhere in a step, a checkpoint, the loader
        process.send_signal(number)
        process.wait()
        return self.recorded(name), self.saved(name)

    def recorded(self, name: str) -> int:
        """Steps in metrics.jsonl."""
        rows = read_steps(self.folder / name / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def saved(self, name: str) -> int:
        """Step of the newest complete checkpoint, 0 without one."""
        folder = self.folder / name / "checkpoints"
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)

    def rows(self, name: str, last: int) -> list[dict]:
        """Its metrics up to and with step `last`, times and all: no two runs of a step have the same."""
        return read_steps(self.folder / name / "metrics.jsonl", last)

    def meshes(self, name: str) -> list[str]:
        """The device mesh that each of its processes said it has."""
        lines = (self.folder / f"{name}.txt").read_text(errors="replace").splitlines()
        return [line.partition(", mesh ")[2] for line in lines if line.startswith("devices: ")]

    def state(self, name: str) -> dict[str, np.ndarray]:
        """Parameters and optimiser at the end, as they are on disk."""
        found = {}
        for part in ("trainable", "opt"):
            folder = self.folder / name / "checkpoints" / str(self.steps) / part
            with ocp.PyTreeCheckpointer() as reader:
                as_numpy = jax.tree.map(
                    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
                )
                tree = reader.restore(folder, restore_args=as_numpy)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[f"{part}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
        return found

    def compare(self, name: str) -> dict[str, float | bool]:
        """A finished run against the unbroken one."""
        ours, theirs = self.state(name), self.state("unbroken")
        same = ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
        keys = [k for k in theirs if k.startswith("trainable")]
        apart = sum(float(np.sum((ours[k].astype(np.float64) - theirs[k]) ** 2)) for k in keys)
        size = sum(float(np.sum(theirs[k].astype(np.float64) ** 2)) for k in keys)
        rows = [read_steps(self.folder / n / "metrics.jsonl") for n in (name, "unbroken")]
        curves = [np.array([row["loss"] for row in several], float) for several in rows]  # not measured: NaN
        if any(len(curve) != self.steps for curve in curves):
            raise CampaignError(f"run '{name}' recorded {len(curves[0])} of {self.steps} steps")
        if not np.array_equal(*map(np.isnan, curves)):
            raise CampaignError(f"run '{name}' measured no loss in other steps than the unbroken one")
        loss = np.nanmax(np.abs(np.subtract(*curves)) / np.abs(curves[1]))
        return {"same bits": same, "parameters": (apart / size) ** 0.5, "loss": float(loss)}


def run(campaign: Campaign, kind: str, kills: int) -> tuple[str, dict[str, float | bool], bool]:
    """One row of the table and whether it is as it should be."""
    moments = []
    more = ()
    if kind == "kill":
        moments = [campaign.interrupt(kind, signal.SIGKILL) for _ in range(kills)]
    elif kind == "term":
        moments = [campaign.interrupt(kind, signal.SIGTERM)]
    else:
        moments = [campaign.interrupt(kind, signal.SIGKILL, after_saving=True)]
        more = (f"--config.mesh.fsdp={max(1, campaign.devices // 2)}", "--config.mesh.tensor=2")
    newest = moments[-1][1]
    before = campaign.rows(kind, newest)
    campaign.finish(kind, *more)
    if campaign.rows(kind, newest) != before:
        raise CampaignError(f"run '{kind}' did not go on from its checkpoint of step {newest}")
    if kind == "mesh" and (newest < EVERY or len(set(campaign.meshes(kind))) != 2):
        raise CampaignError(
            f"run '{kind}' did not move a checkpoint to another mesh: {campaign.meshes(kind)}, {newest}"
        )
    found = campaign.compare(kind)
    listed = ", ".join(f"{step}/{saved}" for step, saved in moments)
    return listed, found, found["loss"] <= TOLERANCE if kind == "mesh" else bool(found["same bits"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, default=None)
    parser.add_argument("--workdir", default="")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.workdir or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(folder, args.steps, args.devices, args.seed)
        campaign.finish("unbroken")
        print(f"{args.steps} steps on {args.devices} CPU device(s), a checkpoint every {EVERY}, dropout 0.1\n")
        print("| how | interrupted after step/newest checkpoint | same bits | parameters apart | largest loss error |")
        print("|---|---|---|---:|---:|", flush=True)
        good = True
        for kind in [args.only] if args.only else KINDS:
            listed, found, right = run(campaign, kind, args.kills)
            good &= right
            bits = "yes" if found["same bits"] else "no"
            print(f"| {kind} | {listed} | {bits} | {found['parameters']:.1e} | {found['loss']:.1e} |", flush=True)
    print("\nas it should be" if good else "\nNOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
