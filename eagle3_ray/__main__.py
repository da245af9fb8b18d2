"""`python -m eagle3_ray` is `eagle3-ray`."""

import sys

from eagle3_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
