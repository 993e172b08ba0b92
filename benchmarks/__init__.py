"""Benchmarks: where the time to the first token goes, against peers in the same run."""
