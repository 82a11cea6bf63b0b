"""`python -m dare_eval.lm …`: lm-evaluation-harness's command with this package's models."""

from dare_eval.lm.harness import main

main()
