"""Encoders on GLUE: fine-tunes, what of them survives dropping, merges, and adapters by size."""
