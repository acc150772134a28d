"""Training: one loop, one file a method (a paper)."""
