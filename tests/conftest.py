"""One thread for each process: tests start two at a time, which else would wait for one another."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
