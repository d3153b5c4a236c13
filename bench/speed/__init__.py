"""Dense against pruned: engines, the ideal, reports."""
