"""A learning run: the training loop, its journal, resuming, several processes."""
