"""Run configurations: each file with a get_config(variant) can be given to `run.py --config=FILE[:VARIANT]`."""
