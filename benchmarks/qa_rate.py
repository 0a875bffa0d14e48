"""Scene -> questions on one core, and what that means for 2 million questions over 100,000 clips.

    python benchmarks/qa_rate.py --clips=500

Scenes are random motion without pictures (32 frames, 3 objects of 48 points), made before the clock starts. Timed in
processor seconds of this process, the fastest of --repeats passes: measuring all relations, choosing, wording, options,
records; then the same with each record written as JSON. The projection is for one core and leaves out reading scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.questions.propose import QuestionRules, propose
from tests.data_prep.scenes.random_scenes import random_scene

QUESTIONS, CLIPS = 2_000_000, 100_000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--per-clip", type=int, default=QUESTIONS // CLIPS)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    scenes = [random_scene(seed) for seed in range(arguments.clips)]
    rules = QuestionRules(per_clip=arguments.per_clip)
    making, writing = [], []
    for _ in range(arguments.repeats):
        start = time.process_time()
        records = [question.record("clip.mp4") for scene in scenes for question in propose(scene, rules, seed=0)]
        made = time.process_time()
        size = sum(len(json.dumps(record)) for record in records)
        making.append(made - start)
        writing.append(time.process_time() - start)
    print(f"{len(records)} questions of {len(scenes)} clips, {size / len(records):.0f} bytes of JSON each")
    for name, seconds in (("scene -> records", min(making)), ("scene -> JSON text", min(writing))):
        rate = len(records) / seconds
        per_clip = seconds / len(scenes)
        print(
            f"{name}: {rate:,.0f} questions/s on one core, {1e3 * per_clip:.2f} ms a clip; "
            f"{CLIPS:,} clips ({CLIPS * len(records) / len(scenes):,.0f} questions): {CLIPS * per_clip / 60:.1f} min"
        )


if __name__ == "__main__":
    main()
