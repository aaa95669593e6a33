"""Decisions, and how long they take in simulated time."""
