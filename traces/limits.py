"""The largest numbers that are taken where a larger one could only be a slip, and would break something further on."""

from __future__ import annotations

MOST_BATCH = 65_536
"""Lanes that run together."""

MOST_LAYERS = 65_536
"""MoE layers of a trace that is generated."""

MOST_EXPERT_BYTES = 1 << 36
"""Bytes of one expert; bytes that are loaded add up in 64 bits."""
