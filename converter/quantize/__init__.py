"""quantize-pruned: the weights of a converted model, or of a stock one, rounded to fewer bits, as vLLM reads them."""
