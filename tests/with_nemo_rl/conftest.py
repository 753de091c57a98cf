"""NeMo-RL's own code on this machine's CPU: it has an environment and sources of its own (`make test-nemo-rl`)."""

from importlib.util import find_spec

if find_spec("nemo_rl") is not None:
    import nemo_rl_on_cpu  # noqa: F401  before anything of NeMo-RL
