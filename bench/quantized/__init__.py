"""Prune x quantize: whether two gains multiply, and what both cost in perplexity."""
