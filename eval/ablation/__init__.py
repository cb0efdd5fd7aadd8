"""Accuracy against one flag, over runs."""
