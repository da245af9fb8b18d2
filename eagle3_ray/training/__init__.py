"""One rank's life: restore, stream bins, step, log, validate, save; and what it does when something goes wrong.

`loop.py` tells the story. `ready.py`, `step.py`, `sharding.py` and the model know no Ray, so they run anywhere torch
runs.
"""
