"""One command that checks and measures on one NVIDIA GPU: `python -m benchmarks.on_gpu --out DIR`.

`__main__.py` starts each part in a process of its own (`part.py`) and ends it when the time is over. A part is a module
with a function `run`: `kernels.py`, `loop.py` and `segments.py`. `reference.py` is what the loop's numbers are compared
with, `meter.py` is time, memory and the form of a result.
"""
