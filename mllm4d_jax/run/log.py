"""What a run leaves to look at: progress bar, metrics.jsonl, TensorBoard, and at the end curve.png and report.md."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

Row = Mapping[str, float | None]

# Averaged over the steps since the last line; everything else is shown as it stands.
_AVERAGED = ("loss", "accuracy", "grad_norm", "step_s", "data_wait_s", "padding")
_SUMMED = ("examples", "clips", "tokens", "visual", "supervised")  # per step; a summary has rates in their place


def read_metrics(path: str | Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, those after step `up_to` and a half-written last line left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if up_to is None or row["step"] <= up_to:
            rows.append(row)
    return rows


class RunLog:
    """Records every step. Use as a context manager.

    One line per step goes to metrics.jsonl; the progress bar, with the time left, and TensorBoard get averages every
    `log_every` steps. In a run over several processes only the first one records.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        steps: int,
        start: int,
        log_every: int,
        name: str = "sft",
        summarize: Callable[[Sequence[Row]], dict[str, float]] | None = None,
        line: Callable[[Mapping[str, float]], str] | None = None,
    ) -> None:
        """
        Args:
          workdir: gets metrics.jsonl and tb/.
          steps: of the whole run.
          start: steps already done; what an interrupted run wrote beyond them is removed.
          log_every: steps between updates of bar and TensorBoard.
          name: of the progress bar.
          summarize: steps -> what TensorBoard gets; None for `summary`.
          line: that -> what the bar says; None for fine-tuning's.
        """
        # Imported here: it takes a moment, and only a run that trains needs it.
        from tensorboardX import SummaryWriter

        self.path, self._every, self._window = Path(workdir) / "metrics.jsonl", log_every, []
        keep_until(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(Path(workdir) / "tb"), purge_step=start + 1)
        self._summarize, self._line = summarize or summary, line or _line
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def step(self, row: Mapping[str, float | None] | None) -> None:
        """Records one step; None is no step.

        Args:
          row: at least "step" (from 1) and what `summarize` needs. For `summary` that is what `trainer.Trainer` gives:
            the names in `_AVERAGED` and `_SUMMED`, "lr", "devices", "mfu" and "memory_gib", these two None where they
            are not known.
        """
        if row is None:
            return
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        self._window.append(row)
        self._bar.update(1)
        if row["step"] % self._every == 0 or row["step"] == self._bar.total:
            self._show(self._summarize(self._window), int(row["step"]))
            self._window = []

    def _show(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._bar.set_postfix_str(self._line(values))


def _line(values: Mapping[str, float]) -> str:
    used = f", MFU {values['mfu']:.0%}" if "mfu" in values else ""
    return (
        f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {values['qa_per_s']:.2f} QA/s, "
        f"{values['tokens_per_s_device']:.0f} tokens/s/device{used}, waiting {values['data_wait']:.0%}"
    )


class NoLog:
    """Takes the place of a `RunLog` in a process that records nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def step(self, row: Mapping[str, float | None] | None) -> None:
        """Does nothing."""


def write_config(path: str | Path, config: Mapping[str, Any]) -> None:
    """Writes the resolved config of a run."""
    Path(path).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of a JSON Lines file that an interrupted run wrote after a step; makes the file if need be."""
    rows = read_metrics(path, step)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Consecutive steps as averages and rates, and the last value of whatever is neither; None is left out.

    "qa_per_s" and "tokens_per_s" count the whole run, "tokens_per_s_device" one device; "mfu" is over the time of the
    steps that have it; "visual_share" is of the real tokens and "data_wait" of the time.
    """
    seconds = max(sum(r["step_s"] for r in rows), 1e-9)
    tokens = sum(r["tokens"] for r in rows)
    out = {k: float(v) for k, v in rows[-1].items() if k not in ("step", *_SUMMED) and v is not None}
    out |= {name: sum(r[name] for r in rows) / len(rows) for name in _AVERAGED}
    out["qa_per_s"] = sum(r["examples"] for r in rows) / seconds
    out["tokens_per_s"] = tokens / seconds
    out["tokens_per_s_device"] = tokens / max(sum(r["step_s"] * r["devices"] for r in rows), 1e-9)
    out["visual_share"] = sum(r["visual"] for r in rows) / max(tokens, 1)
    out["data_wait"] = sum(r["data_wait_s"] for r in rows) / seconds
    measured = [r["eval_loss"] for r in rows if "eval_loss" in r]
    if measured:  # not at every step
        out["eval_loss"] = measured[-1]
    known = [r for r in rows if r["mfu"] is not None]
    if known:
        out["mfu"] = sum(r["mfu"] * r["step_s"] for r in known) / max(sum(r["step_s"] for r in known), 1e-9)
    return out


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values (fewer at the beginning)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def write_curve(path: str | Path, rows: Sequence[Mapping[str, float]], title: str) -> None:
    """Draws loss, token accuracy, learning rate and gradient norm over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    steps = [r["step"] for r in rows]
    width = max(1, len(rows) // 20)
    panels = (
        ("loss", "loss (nats per supervised token)", False),
        ("accuracy", "token accuracy", False),
        ("lr", "learning rate", False),
        ("grad_norm", "gradient norm before clipping", True),
    )
    for axis, (name, label, log) in zip(axes.flat, panels, strict=True):
        values = [r[name] for r in rows]
        if name == "lr":
            axis.plot(steps, values, color="tab:blue")
        else:
            axis.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
            axis.plot(steps, smoothed(values, width), color="tab:blue", label=f"mean of {width}")
            axis.legend(frameon=False)
        if log and min(values) > 0:
            axis.set_yscale("log")
        elif name in ("loss", "accuracy"):
            axis.set_ylim(bottom=0)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def write_report(
    path: str | Path, rows: Sequence[Mapping[str, float | None]], config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Writes the run's page.

    Args:
      path: report.md.
      rows: the run's metrics, in order.
      config: the resolved config, flat.
      facts: further "name: value" lines about the run.
    """
    tenth = max(1, math.ceil(len(rows) / 10))
    picked = [rows[i : i + tenth] for i in range(0, len(rows), tenth)]
    first, last = summary(picked[0]), summary(picked[-1])
    lines = [
        "# Supervised fine-tuning",
        "",
        f"{len(rows)} steps; loss {first['loss']:.4f} (mean of the first {len(picked[0])} steps) -> {last['loss']:.4f} "
        f"(the last {len(picked[-1])}); token accuracy {first['accuracy']:.3f} -> {last['accuracy']:.3f}.",
        "",
        "![curves](curve.png)",
        "",
        "| steps | loss | token accuracy | lr | s/step | QA/s | tokens/s/device | MFU | waiting for data | padding |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for part in picked:
        s = summary(part)
        used = f"{s['mfu']:.0%}" if "mfu" in s else "n/a"
        lines.append(
            f"| {part[0]['step']}-{part[-1]['step']} | {s['loss']:.4f} | {s['accuracy']:.3f} | {s['lr']:.2e} | "
            f"{s['step_s']:.2f} | {s['qa_per_s']:.2f} | {s['tokens_per_s_device']:.0f} | {used} | "
            f"{s['data_wait']:.0%} | {s['padding']:.0%} |"
        )
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items()), "", "## Files", ""]
    lines += [
        "- `metrics.jsonl`: one line per step; `tb/`: the same for TensorBoard (`tensorboard --logdir tb`)",
        "- `checkpoints/`: parameters, optimiser and position; the same command continues from the newest",
        "- `quarantine.jsonl`: records that could not be used, with the reason (only when there are any)",
        "- `config.json`: the config as it was resolved",
        "",
        "## Config",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| {key} | `{value!r}` |" for key, value in config.items()),
        "",
    ]
    Path(path).write_text("\n".join(lines), encoding="utf-8")
