"""README.md of an adapter directory: what the hub and people read."""

from __future__ import annotations

import json
from pathlib import Path

from dare_adapters.config import WEIGHTS_NAME, AdapterConfig

__all__ = ["write_model_card"]

_LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def write_model_card(directory: Path, config: AdapterConfig, base_nbytes: int) -> None:
    """Write the card.

    Args:
        directory: of the adapter, its tensors file in place.
        config: what it describes.
        base_nbytes: bytes of the base's checkpoint.
    """
    size = (directory / WEIGHTS_NAME).stat().st_size
    base = config.base_model_name_or_path or "the base model"
    finetuned = config.finetuned_model.get("name_or_path") or "a full fine-tune"
    loader = _LOADERS.get(config.task_type or "", "AutoModel")
    front = ["library_name: dare-adapters", f"base_model: {json.dumps(base)}"]
    front += ["base_model_relation: adapter", "tags:", "- dare", "- dare-adapters", "- delta"]
    rescaled = "rescaled by 1/(1-p)" if config.rescale else "not rescaled"
    kept = {
        "dare": f"a random {1 - config.drop_rate:.3g} of the delta's entries, {rescaled}",
        "drop_only": f"a random {1 - config.drop_rate:.3g} of the delta's entries, {rescaled}",
        "magnitude": f"the largest {1 - config.drop_rate:.3g} of the delta's entries",
    }.get(config.method, config.method)
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# A DARE adapter over {base}",
        "",
        f"What {finetuned} learned, as a difference to `{base}`: {kept} "
        "([Yu et al., ICML 2024](https://arxiv.org/abs/2311.03099)).",
        "",
        "| | |",
        "|---|---|",
        f"| size | {size / 1e6:.2f} MB ({base_nbytes / max(size, 1):.0f} times smaller than the "
        f"base's {base_nbytes / 1e6:.1f} MB) |",
        f"| method, drop rate, bits | {config.method}, {config.drop_rate}, {config.bits} |",
        f"| mask, seed | {config.mask}, {config.seed} |",
        f"| base, revision | {base}, {config.revision or 'not recorded'} |",
        f"| fine-tune | {finetuned} |",
        "",
        "```python",
        "import dare_adapters",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("{base}")',
        'model.load_dare_adapter("PATH OR HUB ID OF THIS ADAPTER")',
        "```",
        "",
    ]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")
