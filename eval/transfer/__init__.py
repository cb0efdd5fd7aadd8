"""Transfer to 12 datasets by logistic regression on frozen features, and few-shot episodes."""
