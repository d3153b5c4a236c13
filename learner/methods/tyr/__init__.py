"""Tyr-the-Pruner, arXiv 2503.09657."""
