"""Speed and memory of the recipes."""
