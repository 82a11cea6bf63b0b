"""DARE adapters in unmodified vLLM."""
