"""Fast, honest machine unlearning for PyTorch."""
