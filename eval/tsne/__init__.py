"""t-SNE of test images, runs side by side."""
