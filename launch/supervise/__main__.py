"""`python -m launch.supervise FOLDER`: what a batch script runs."""

import sys

from launch.supervise.controller import main

sys.exit(main(sys.argv[1:]))
