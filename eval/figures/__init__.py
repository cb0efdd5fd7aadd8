"""Figures made of run folders."""
