"""NeMo's tests run in their own environment (`make test-nemo`)."""

from importlib.util import find_spec

NEEDS = {
    "test_nemo_aligner.py": "nemo_aligner",
    "test_nemo_aligner_settings.py": "nemo_aligner",
    "test_nemo_run.py": "nemo_run",
}

collect_ignore = [test for test, package in NEEDS.items() if find_spec(package) is None]
