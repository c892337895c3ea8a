"""Scaling laws of tumour segmentation with real and synthetic scans, in JAX."""
