"""A grid of runs: read from a file, checked as a whole, run in parallel, kept by content, resumable."""
