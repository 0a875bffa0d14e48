"""System prompts: none for SFT, a spatio-temporal reasoning prompt for cold start and RL, or one from a file."""

from __future__ import annotations

from collections.abc import Mapping

from mllm4d_jax.files.remote import place
from mllm4d_jax.qa.errors import ProcessorError, did_you_mean

ST_COT = """\
You answer multiple-choice questions about how objects and the camera move in a video. Positions are in \
metres, in one world frame that stays fixed during the video, with X to the right, Y down and Z forward.

Reply in exactly this form and write nothing outside the two tags:
<thinking>your reasoning</thinking><answer>letter</answer>

Reason in five steps:
1. Say what is asked, and name the start frame and the end frame that the question is about.
2. Give the spatial state at the start frame.
3. Describe what can be seen to move between the two frames: the camera, the object, or both.
4. Give the spatial state at the end frame.
5. Derive the answer from the two states and pick the option that agrees with it.

Write each of the two states as a block of this shape, with numbers in metres:
**Spatial State (start frame):**
- Camera Center: [x, y, z]
- Object Center: [x, y, z]

Name the frame in the title ("start frame", "end frame"). Write null instead of the brackets when a centre plays no \
part in the question. Put only the letter of the chosen option between <answer> and </answer>."""

PRESETS: Mapping[str, str] = {"st_cot": ST_COT}


def resolve_system_prompt(system: str = "", file: str = "") -> str | None:
    """Return the configured system prompt: a preset by its name, literal text or a file's text; None without any.

    A file, here or in a bucket, is UTF-8; line breaks at its very end are left out.

    Raises:
      ProcessorError: both are set, the file is missing, not UTF-8 or blank, or `system` is a single word that is no
        preset (a typing error, not a prompt). RemoteError: its bucket cannot be used.
    """
    if system and file:
        raise ProcessorError("give a system prompt or a system prompt file, not both")
    if file:
        try:
            text = place(file).read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except OSError as error:
            raise ProcessorError(
                f"system prompt file {file} cannot be read ({error.strerror or 'not there'})"
            ) from error
        except UnicodeDecodeError as error:
            raise ProcessorError(f"system prompt file {file} is not UTF-8 text") from error
        if not text.strip():
            raise ProcessorError(f"system prompt file {file} is empty")
        return text.rstrip("\r\n")
    if not system:
        return None
    if system in PRESETS:
        return PRESETS[system]
    if len(system.split()) == 1:
        hint = did_you_mean(system, PRESETS)
        raise ProcessorError(f"no system prompt preset {system!r} (known: {', '.join(PRESETS)}){hint}")
    return system
