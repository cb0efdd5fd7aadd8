"""The few things that all recipes and evaluations share."""
