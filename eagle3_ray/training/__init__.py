"""One rank's life: restore, stream bins, step, log, validate, save.

`loop.py` tells the story; only it and the progress board import Ray, so `step.py`, `sharding.py` and the model run
anywhere torch runs.
"""
