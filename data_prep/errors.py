"""Errors of the data preparation that name a file, a clip or a field for the person who has to repair it."""

from __future__ import annotations


class SceneError(ValueError):
    """A scene, or a file it is made from, is wrong or damaged; the message names the field or the file and key."""
