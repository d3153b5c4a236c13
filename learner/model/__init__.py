"""The dense model that masks are learned on: loading, units, masks, perplexity."""
