"""Phrases of the oracle's narratives. Every table has `VARIANTS` entries that say the same thing in other words.

Fields: {i}, {j}: the two frames; {o}: the object; {cam}, {obj}: clauses saying where camera and object go in the fixed
axes; {sight}: what can be seen of it; {d}: displacement [x, y, z] between the two written states; {n}: its length;
{v}: the measured value; {before}, {after}: distances between camera and object centre at the two states; {verdict}:
what {v} means. Lengths are in metres. No verb or pronoun depends on the number of objects ("the two men").

The distances to an object are measured to its nearest visible point, and the written states hold the middle of its
points. So where a relation is about such a distance, the text gives both numbers and says which one the question is
about; it never says that one equals the other.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIANTS = 4

GOAL: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (
        "The task is to find how far apart the camera's places at frame {i} and frame {j} are.",
        "I need the straight distance that lies between the camera at frame {i} and the camera at frame {j}.",
        "Only the camera matters here: its position at the start, frame {i}, has to be compared with the one at frame "
        "{j}, the end.",
        "What is wanted is the length of the camera's net move. It starts at frame {i} and ends at frame {j}.",
    ),
    "camera_relative_direction": (
        "The task is to tell in which direction the camera goes from frame {i} to frame {j}, as it was turned at frame "
        "{i}.",
        "I have to name the main axis of the camera's move. Start frame is {i}, end frame is {j}, and the axes are "
        "those of the camera at frame {i}.",
        "Only the camera matters here. Frame {i} gives the start and the directions, frame {j} gives the end.",
        "What is wanted is the camera's dominant direction of travel between frame {i} and frame {j}, judged by its "
        "own pose at frame {i}.",
    ),
    "object_absolute_distance": (
        "The task is to find how far the position of {o} shifts in the scene between frame {i} and frame {j}.",
        "I need the straight distance between the places of {o} at frame {i} and at frame {j}.",
        "Two places of {o} have to be compared, at the start frame {i} and at the end frame {j}; the camera's own move "
        "must not be mixed in.",
        "What is wanted is the net displacement of {o}, starting at frame {i} and ending at frame {j}.",
    ),
    "object_camera_absolute_distance": (
        "The task is to find the distance from where the camera is at frame {i} to the nearest visible point of {o} at "
        "frame {j}.",
        "I need two things: the camera's position at the start frame {i}, and the nearest visible point of {o} at the"
        " end frame {j}.",
        "The distance asked about mixes two moments. The camera counts with the position at frame {i}, {o} with the "
        "nearest visible point at frame {j}.",
        "What is wanted is how far the nearest visible point of {o} at frame {j} lies from the camera's place at frame "
        "{i}.",
    ),
    "object_camera_relative_distance": (
        "The task is to tell whether the nearest visible point of {o} is closer to the camera or farther from it at "
        "frame {j} than at frame {i}.",
        "I have to compare two distances from the camera to the nearest visible point of {o}: the one at frame {i} and "
        "the one at frame {j}.",
        "The start frame is {i} and the end frame is {j}; what counts is how the gap between the camera and the "
        "nearest visible point of {o} changes.",
        "What is wanted is the change of the distance between the camera and the nearest visible point of {o}, with "
        "both free to move, from frame {i} to frame {j}.",
    ),
    "object_camera_lateral_direction": (
        "The task is to tell whether the position of {o} shifts left or right between frame {i} and frame {j}, in the"
        " view of frame {i}.",
        "I have to look at the sideways motion of {o}. Frame {i} is the start and sets the axes, frame {j} is the end.",
        "Start frame {i}, end frame {j}: what counts is how far the position of {o} shifts along the horizontal axis "
        "of the first of them.",
        "What is wanted is the left-right displacement of {o} from frame {i} to frame {j}, with the camera held as it "
        "was at frame {i}.",
    ),
    "object_camera_longitudinal_direction": (
        "The task is to tell whether the position of {o} shifts away or closer along the line of sight of frame {i}, "
        "up to frame {j}.",
        "I have to look at the motion of {o} in depth. Frame {i} is the start and sets the axes, frame {j} is the end.",
        "Start frame {i}, end frame {j}: what counts is how far the position of {o} shifts along the viewing axis of "
        "the first of them.",
        "What is wanted is the change in depth of {o} from frame {i} to frame {j}, with the camera held as it was at "
        "frame {i}.",
    ),
}
START = (
    "At the start, frame {i}, I place things as follows.",
    "First the situation at frame {i}:",
    "This is my estimate of the state when frame {i} is shown.",
    "Reading the geometry off frame {i} gives this state.",
)
END = (
    "At the end, frame {j}, they are here.",
    "Then the situation at frame {j}:",
    "This is my estimate of the state when frame {j} is shown.",
    "Reading the geometry off frame {j} gives this state.",
)
_COMPONENT_EVIDENCE = (
    "Between these frames {sight}. In the scene as a whole {obj}; {cam}.",
    "Following the frames in between against the static surroundings, I see that {sight}, while {cam}.",
    "With the viewpoint of frame {i} kept in mind, {sight}. The camera's own part is left out: {cam}.",
    "I separate the two motions in the frames in between: {cam}, and as for the object, {sight}.",
)
EVIDENCE: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (
        "Between these frames {cam}, and {sight}.",
        "Following the frames in between, I see that {sight}; {cam}.",
        "The pictures in between show that {cam}. The background agrees: {sight}.",
        "On the way from one frame to the other {sight}, which fits that {cam}.",
    ),
    "camera_relative_direction": (
        "Between these frames {sight}.",
        "Following the frames in between, I see that {sight}.",
        "The pictures in between give it away by parallax: {sight}.",
        "Leaving aside any turning of the view, {sight} on the way from frame {i} to frame {j}.",
    ),
    "object_absolute_distance": (
        "Between these frames {obj}, judged by the things around that stand still; {cam}.",
        "Following the frames in between, I see that {cam}, while {obj}.",
        "Against the static surroundings, {obj}. As for the viewpoint, {cam}.",
        "I separate the two motions in the frames in between: {cam}, and {obj}.",
    ),
    "object_camera_absolute_distance": (
        "Between these frames {obj}; {cam}, but its place at frame {i} is what counts.",
        "Following the frames in between, I see that {obj}, while {cam}.",
        "Against the static surroundings, {obj}. As for the viewpoint, {cam}.",
        "I separate the two motions in the frames in between: {cam}, and {obj}.",
    ),
    "object_camera_relative_distance": (
        "Between these frames {cam} and {obj}. In effect {sight}.",
        "Following the frames in between, I see that {sight}: {obj}, while {cam}.",
        "Both motions matter. For one thing {cam}, for another {obj}, and so {sight}.",
        "I put the two motions in the frames in between together: {obj}, {cam}, and {sight}.",
    ),
    "object_camera_lateral_direction": _COMPONENT_EVIDENCE,
    "object_camera_longitudinal_direction": _COMPONENT_EVIDENCE,
}
SYNTHESIS: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (
        "The camera position changes by {d}, and the length of that is {n} m.",
        "Subtracting the first camera position from the second leaves {d}; in a straight line this is {n} m.",
        "From the two states the camera's displacement is {d}. Its norm comes to {n} m.",
        "End minus start is {d} for the camera, so the two places lie {n} m apart.",
    ),
    "camera_relative_direction": (
        "The two states differ by {d}. Turned into the axes of the camera at frame {i} this is about {v}, and "
        "{verdict}.",
        "Subtracting the first camera position from the second leaves {d}; seen with the orientation of frame {i} it "
        "is about {v}, where {verdict}.",
        "From the two states the camera's displacement is {d}. In the camera's own axes at frame {i} I get about {v}: "
        "{verdict}.",
        "End minus start is {d}. The pose at frame {i} makes about {v} of it (right, down, forward), in which "
        "{verdict}.",
    ),
    "object_absolute_distance": (
        "The place of {o} changes by {d}, and the length of that is {n} m.",
        "Subtracting the first place of {o} from the second leaves {d}; in a straight line this is {n} m.",
        "From the two states the displacement of {o} is {d}. Its norm comes to {n} m.",
        "End minus start is {d} for {o}, so the two places lie {n} m apart.",
    ),
    "object_camera_absolute_distance": (
        "From the camera at the start to the middle of {o} at the end it is {d}, or {n} m. What counts is the visible "
        "part of {o} that is nearest to that place, and I judge it to be about {v} m away.",
        "The end place of {o} minus the start place of the camera is {d}, {n} m long. That leads to the middle of {o}; "
        "to the nearest visible point I estimate {v} m.",
        "Taking the camera from the first state and {o} from the second, their centres are {n} m apart ({d}). The "
        "distance asked about ends at the nearest point of {o} that can be seen, roughly {v} m from there.",
        "Between the two centres lie {d}, so {n} m. The object has some extent, though: measured to the closest "
        "visible point the distance is about {v} m.",
    ),
    "object_camera_relative_distance": (
        "Centre to centre, the distance is {before} m at the start and {after} m at the end. For the nearest visible "
        "part of {o}, which counts here, the change is about {v} m: {verdict}.",
        "The states put the middle of {o} at {before} m from the camera first and at {after} m later. Measured to the "
        "closest visible point the difference is about {v} m, {verdict}.",
        "From {before} m between the centres it comes to {after} m. The gap to the nearest point of {o} that can be "
        "seen changes by about {v} m; this is {verdict}.",
        "The first state has {before} m between camera and object centre, the second has {after} m. By the part of {o} "
        "closest to the camera I judge the change to be about {v} m, {verdict}.",
    ),
    "object_camera_lateral_direction": (
        "The place of {o} changes by {d}. Along the horizontal axis of the camera at frame {i}, positive to the right, "
        "this amounts to {v} m: {verdict}.",
        "Subtracting the first place of {o} from the second leaves {d}; its part across the view of frame {i} is {v} m "
        "(to the right is positive), {verdict}.",
        "From the two states the displacement of {o} is {d}. With the orientation of frame {i}, {v} m of it point to "
        "the right, {verdict}.",
        "End minus start is {d} for {o}. Its x component in the camera axes of frame {i} is {v} m, {verdict}.",
    ),
    "object_camera_longitudinal_direction": (
        "The place of {o} changes by {d}. Along the viewing axis of the camera at frame {i}, positive away from it, "
        "this amounts to {v} m: {verdict}.",
        "Subtracting the first place of {o} from the second leaves {d}; its part along the line of sight of frame "
        "{i} is {v} m (away is positive), {verdict}.",
        "From the two states the displacement of {o} is {d}. With the orientation of frame {i}, {v} m of it point into "
        "the depth of the picture, {verdict}.",
        "End minus start is {d} for {o}. Its z component in the camera axes of frame {i} is {v} m, {verdict}.",
    ),
}
CLOSING = (
    "Option {letter}, {text}, agrees with this.",
    "Among the options, {letter} ({text}) is the one that fits.",
    "This points to {text}, which is option {letter}.",
    "So the answer is {letter}, {text}.",
)

# What is seen when the camera goes in a direction of its own axes; parallax holds whether or not the view turns.
CAMERA_SIGHT: Mapping[str, str] = {
    "right": "nearby things drift to the left against what lies behind them",
    "left": "nearby things drift to the right against what lies behind them",
    "down": "nearby things rise against what lies behind them",
    "up": "nearby things sink against what lies behind them",
    "forward": "things ahead grow and spread away from the point the camera heads for",
    "backward": "things ahead shrink and draw together while more of the surroundings comes into reach",
}
# scenario -> label -> (what is seen of the object, what the measured value means).
OBJECT_SIGHT: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "object_camera_relative_distance": {
        "farther": ("the gap between the camera and {o} widens", "a clear increase"),
        "closer": ("the gap between the camera and {o} narrows", "a clear decrease"),
        "not moving": (
            "the gap between the camera and {o} stays about as wide as it was",
            "too little to count as a change",
        ),
    },
    "object_camera_lateral_direction": {
        "right": ("the position of {o} ends up further to the right than it was", "clearly to the right"),
        "left": ("the position of {o} ends up further to the left than it was", "clearly to the left"),
        "not moving": ("the position of {o} stays about the same from left to right", "too little to count as motion"),
    },
    "object_camera_longitudinal_direction": {
        "farther": ("the position of {o} ends up deeper in the scene than it was", "clearly away from the camera"),
        "closer": ("the position of {o} ends up less deep in the scene than it was", "clearly towards the camera"),
        "not moving": ("the depth of {o} stays about the same", "too little to count as motion"),
    },
}
