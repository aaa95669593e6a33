"""The same decisions, measured with torch."""
