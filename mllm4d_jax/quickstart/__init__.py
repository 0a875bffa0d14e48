"""The paper in miniature: stages that are tasks, run one after the other, and the table of what they reached."""
