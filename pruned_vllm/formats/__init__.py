"""What is on disk: config.json, masks, names and shapes of tensors. Needs neither torch nor vLLM."""
