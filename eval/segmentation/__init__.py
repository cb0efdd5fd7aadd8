"""Semantic segmentation: UPerNet on ADE20K from a backbone."""
