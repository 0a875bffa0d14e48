"""The page of a run: what its workdir holds, as one self-contained HTML file. `build.write_report` makes it."""
