"""A verb a file: each has `run(settings)`, decides everything on the driver, and leaves the work to Ray."""
