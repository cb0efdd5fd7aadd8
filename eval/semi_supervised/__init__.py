"""Fine-tuning on 1 % or 10 % of the labels."""
