"""Which neighbours a run retrieves, over training and by positiveness."""
