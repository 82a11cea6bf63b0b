"""Writes the golden adapters beside this file: `python -m tests.golden.make_golden`.

Only a new format version is a reason to run it: what lies here must stay readable for ever.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

import dare_adapters
from tests.checkpoints import fine_tuned, integers, write_checkpoint
from tests.reference import decode_adapter

GOLDEN = Path(__file__).parent
SEED = 20240721
# Random supports of both kinds, stored supports of both kinds, and the other kinds of codes.
OPTIONS = {
    "adapter_v1": {"drop_rate": 0.75, "bits": 4, "drop_rates": {"*.up_proj.*": 0.7}},
    "adapter_v1_magnitude": {
        "method": "magnitude",
        "drop_rate": 0.75,
        "bits": 2,
        "drop_rates": {"*.up_proj.*": 0.97},
    },
    "adapter_v1_one_bit": {"drop_rate": 0.5, "bits": 1},
    "adapter_v1_eight_bit": {"drop_rate": 0.9, "bits": 8},
    "adapter_v1_sixteen_bit": {"drop_rate": 0.9, "bits": 16},
}


def golden_checkpoints() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base and fine-tune: every kind of parameter that the format knows."""
    base = {
        "model.embed_tokens.weight": integers((12, 18), 5),
        "model.layers.0.mlp.up_proj.weight": integers((9, 37), 11),
        "model.layers.0.mlp.down_proj.weight": integers((7, 50), 13).to(torch.bfloat16),
        "model.layers.0.conv.weight": integers((3, 5, 4, 2), 17),
        "model.layers.0.norm.weight": integers((21,), 19).to(torch.float16),
        "model.layers.0.frozen.weight": integers((4, 6), 23),
    }
    finetuned = fine_tuned(base)
    finetuned["model.layers.0.frozen.weight"] = base["model.layers.0.frozen.weight"]
    embedding = finetuned["model.embed_tokens.weight"]
    finetuned["model.embed_tokens.weight"] = torch.cat([embedding, integers((2, 18), 400)])
    finetuned["classifier.weight"] = integers((3, 18), 29).to(torch.bfloat16)
    return base, finetuned


def main() -> None:
    base, finetuned = golden_checkpoints()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # the adapter records the paths it was given
        write_checkpoint(Path("base"), base)
        write_checkpoint(Path("finetuned"), finetuned)
        for name, options in OPTIONS.items():
            dare_adapters.extract("base", "finetuned", name, seed=SEED, progress=False, **options)
            shutil.copytree(name, GOLDEN / name, dirs_exist_ok=True)
            decoded = decode_adapter(GOLDEN / name)
            expected = {key: value.astype(np.float32) for key, value in decoded.items()}
            save_file(expected, GOLDEN / f"{name}_expected.safetensors")


if __name__ == "__main__":
    main()
