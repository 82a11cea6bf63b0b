"""Decoders: GSM8K, MATH, HumanEval, MBPP and AlpacaEval through lm-evaluation-harness."""
