"""Measurements; each module runs alone, like `python -m benchmarks.linear`, and prints a table."""
