"""The experiments of the DARE paper (Yu et al., ICML 2024) as commands."""
