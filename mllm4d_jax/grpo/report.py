"""The page and the curves of a finished run; made from the files of its workdir alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm4d_jax.grpo.log import summary
from mllm4d_jax.run.log import Row, read_metrics, smoothed

_PHASES = ("data", "vision", "prefill", "decode", "score", "update")


def report(workdir: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes curve.png and report.md.

    Args:
      workdir: has metrics.jsonl.
      config: the resolved config, flat.
      facts: further "name: value" lines.
    """
    rows, evals = read_metrics(workdir / "metrics.jsonl"), read_metrics(workdir / "evals.jsonl")
    _write_curve(workdir / "curve.png", rows, evals)
    tenth = max(1, math.ceil(len(rows) / 10))
    parts = [rows[i : i + tenth] for i in range(0, len(rows), tenth)]
    means = [summary(part) for part in parts]
    lines = [
        "# Reinforcement learning",
        "",
        f"{len(rows)} steps; sampled reward {means[0]['reward']:.3f} (mean of the first {len(parts[0])} steps) -> "
        f"{means[-1]['reward']:.3f} (the last {len(parts[-1])}).",
        "",
        "![curves](curve.png)",
        "",
        *_steps_table(parts, means),
        *_evals_table(evals),
        *_phases_table(means),
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "## Files",
        "",
        "- `completions.jsonl`: every completion with its question, rewards and advantage",
        "- `metrics.jsonl`: one line per step; `evals.jsonl`: held-out prompts; `tb/`: for TensorBoard",
        "- `checkpoints/`: parameters, optimiser, position and completions drawn ahead; the same command continues",
        "- `start/`: the policy at the start, which the KL term refers to",
        "- `quarantine.jsonl`: records that could not be used, with the reason (only when there are any)",
        "",
        "## Config",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| {key} | `{value!r}` |" for key, value in config.items()),
        "",
    ]
    (workdir / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _components(values: Mapping[str, Any]) -> list[str]:
    names = [key.removeprefix("reward/") for key in values if key.startswith("reward/")]
    return [name for name in names if name != "total"]


def _steps_table(parts: Sequence[Sequence[Row]], means: Sequence[Mapping[str, float]]) -> list[str]:
    names = _components(means[0])
    head = ["steps", "reward", *names, "tokens", "cut off", "dead groups", "KL", "entropy", "gap", "s/step"]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for part, mean in zip(parts, means, strict=True):
        cells = [f"{mean[f'reward/{name}']:.3f}" for name in names]
        shown = [mean["completion_tokens"], mean["truncated"], mean["dead_groups"]]
        cells += [f"{shown[0]:.0f}", f"{shown[1]:.0%}", f"{shown[2]:.0%}"]
        cells += [f"{mean[name]:.4f}" if name in mean else "n/a" for name in ("kl", "entropy", "gap")]
        span = f"{part[0]['step']}-{part[-1]['step']}"
        lines.append(f"| {span} | {mean['reward']:.3f} | {' | '.join(cells)} | {mean['step_s']:.2f} |")
    return [*lines, ""]


def _evals_table(evals: Sequence[Row]) -> list[str]:
    if not evals:
        return []
    names = _components(evals[0])
    lines = ["Held-out prompts, one greedy completion each:", "", f"| after step | n | reward | {' | '.join(names)} |"]
    lines.append(f"|---:|---:|---:{'|---:' * len(names)}|")
    for row in evals:
        cells = " | ".join(f"{row[f'reward/{name}']:.3f}" for name in names)
        lines.append(f"| {row['step']} | {row['n']} | {row['reward']:.3f} | {cells} |")
    return [*lines, ""]


def _phases_table(means: Sequence[Mapping[str, float]]) -> list[str]:
    """Seconds of a step by phase, without the first tenth, which compiles."""
    steady = means[1:] or means
    seconds = [sum(m.get(f"time/{name}", 0.0) for m in steady) / len(steady) for name in _PHASES]
    return [
        f"| seconds of a step | {' | '.join(_PHASES)} |",
        f"|---{'|---:' * len(_PHASES)}|",
        f"| mean{'' if len(means) == 1 else ' after the first tenth'} | {' | '.join(f'{s:.3f}' for s in seconds)} |",
        "",
    ]


def _write_curve(path: Path, rows: Sequence[Row], evals: Sequence[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True)
    steps, width = [r["step"] for r in rows], max(1, len(rows) // 20)

    def draw(axis: Any, names: Sequence[str], title: str, log: bool = False) -> None:
        for name in names:
            known = [(s, r[name]) for s, r in zip(steps, rows, strict=True) if r.get(name) is not None]
            if known:
                x, y = zip(*known, strict=True)
                axis.plot(x, smoothed(y, width), label=name.removeprefix("reward/"), linewidth=1.5)
        if log and any((r.get(names[0]) or 0) > 0 for r in rows):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if len(names) > 1 and axis.lines:
            axis.legend(frameon=False, fontsize=8)

    draw(axes[0, 0], ("reward",), f"sampled reward (mean of {width}), held-out as dots")
    axes[0, 0].plot([e["step"] for e in evals], [e["reward"] for e in evals], "o", color="tab:orange")
    draw(axes[0, 1], [f"reward/{name}" for name in _components(rows[0])], "components of the reward")
    draw(axes[0, 2], ("dead_groups", "truncated"), "shares: groups without signal, completions cut off")
    draw(axes[1, 0], ("kl", "entropy"), "KL to the start and entropy (nats per token)")
    draw(axes[1, 1], ("completion_tokens", "completion_tokens_max"), "tokens of a completion")
    draw(axes[1, 2], ("grad_norm",), "gradient norm before clipping", log=True)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(f"GRPO, {rows[-1]['step']} steps")
    figure.savefig(path, dpi=110)
