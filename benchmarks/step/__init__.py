"""One training step of this loop beside one of TRL's GRPOTrainer: `make benchmark-step`.

`cases.py` says what a step is, `this_loop.py` and `with_trl.py` are processes that take a step each time they are
asked, each in its own environment, and `__main__.py` asks them in turns.
"""
