"""A row of metrics.jsonl as fine-tuning writes it."""

from __future__ import annotations


def row(step, **changes):
    """The row of a step, some columns changed."""
    values = dict(
        step=step,
        loss=4.0 / step if step else 4.0,
        accuracy=0.5,
        grad_norm=1.0,
        lr=1e-3 / step if step else 1e-3,
        step_s=0.5,
        data_wait_s=0.1,
        examples=4,
        clips=1,
        tokens=100,
        visual=40,
        supervised=12,
        padding=0.25,
        mfu=None,
        memory_gib=None,
        devices=2,
        position=4 * step,
        quarantined=0,
        compiles=1,
        retraces=0,
    )
    return values | changes
