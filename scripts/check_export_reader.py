"""Exports read by a reader that is not transformers: mlx-lm, on the CPU. Logits are compared with
transformers'.

    python -m venv mlx && mlx/bin/pip install "mlx[cpu]" mlx-lm torch -c constraints.txt
    mlx/bin/python -P scripts/check_export_reader.py OUT...

It needs 75 MB of packages that nothing else here needs, so it is a command of its own and no test. Exit
status 1 if a reader refuses a folder, or its logits differ by more than LIMIT. mlx-lm knows Llama, Qwen,
Gemma, OLMo, Mixtral and others; it implements each of them itself and shares with transformers only the
tokenizer's reader.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM

LIMIT = 1e-4  # of the largest logit; f32 in another order of summation gives 1e-6


def main() -> int:
    """Check every folder that is named; the exit status."""
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    return int(any(not check(folder) for folder in folders))


def check(folder: Path) -> bool:
    """Whether mlx-lm's logits for some ids are transformers'; says so in a line."""
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    ids = np.arange(40).reshape(2, 20) * 6 % reference.config.vocab_size
    with torch.no_grad():
        wanted = reference(input_ids=torch.from_numpy(ids)).logits.numpy()
    model, _ = load_model(folder)
    found = np.array(model(mx.array(ids)).astype(mx.float32))
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    print(f"{folder}: largest difference {error:.1e} of the largest logit {'' if error <= LIMIT else '(!)'}")
    return error <= LIMIT


if __name__ == "__main__":
    sys.exit(main())
