"""What results mean: frames, metrics, comparison, plots, reports."""
