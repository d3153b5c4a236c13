"""MaskPrune, arXiv 2502.14008."""
