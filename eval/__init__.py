"""Evaluations: each takes an exported backbone or a run folder."""
