import importlib.util
import subprocess
import sys

HEAVY = ("megatron", "transformers", "pydantic", "omegaconf", "vllm", "transformer_engine")


def test_a_fresh_interpreter_imports_torch_alone() -> None:
    modules = ["eapo_megatron.algorithms"]
    if importlib.util.find_spec("eapo_megatron.vocab_parallel"):
        modules.append("eapo_megatron.vocab_parallel")
    script = f"import sys, {', '.join(modules)}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
