"""NeMo's tests run in their own environment (`make test-nemo`)."""

from importlib.util import find_spec

NEEDS = {"nemo_aligner": "test_nemo_aligner.py", "nemo_run": "test_nemo_run.py"}

collect_ignore = [test for package, test in NEEDS.items() if find_spec(package) is None]
