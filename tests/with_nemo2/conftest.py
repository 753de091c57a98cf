"""NeMo 2's tests run in their own environment (`make test-nemo2`)."""

from importlib.util import find_spec

if find_spec("nemo") is None:
    collect_ignore_glob = ["test_*"]
else:
    import nemo2_on_cpu  # noqa: F401  before anything of NeMo
