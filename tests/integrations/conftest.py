"""NeMo's tests run in their own environment (`make test-nemo`)."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("nemo_aligner") else ["test_nemo_aligner.py"]
