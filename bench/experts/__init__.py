"""Ragged experts against vLLM's own op, one layer at a time."""
