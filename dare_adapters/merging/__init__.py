"""Merge recipes run: to a checkpoint, or to an adapter."""
