"""Runs VLMEvalKit's run.py, of the folder this is started in, with the data sets beside this file."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if not os.path.isfile("run.py") or not os.path.isdir("vlmeval"):
        sys.exit("start this in a checkout of VLMEvalKit: there is no run.py with a folder vlmeval here")
    sys.path[:0] = [os.getcwd(), str(Path(__file__).resolve().parent)]
    import strict_video_mcq

    strict_video_mcq.register()
    runpy.run_path("run.py", run_name="__main__")
