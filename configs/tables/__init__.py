"""The keys of every task, one table each; `configs/common.py` puts them together."""
