"""finetune-pruned: trains back what pruning lost."""
