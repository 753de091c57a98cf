"""Greedy tokens of a Hugging Face folder in vLLM. Arguments: folder, JSON of the prompts, output file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(folder: str, prompts: list[list[int]], out: Path) -> None:
    llm = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    out.write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
