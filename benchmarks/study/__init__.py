"""The paper's study on the built-in task (arXiv 2604.11056, Sec. 4 to 6): `make study PART=quadrants|eapo|methods`.

`grid.py` says which runs there are, `runner.py` runs them, `predictions.py` fixes what is tested and how, and `page.py`
writes docs/study.md from what was recorded.
"""
