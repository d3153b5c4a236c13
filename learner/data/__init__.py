"""Text to learn from, as token ids."""
