"""``accelerate launch training/distill.py --config configs/digits_sid.yaml key=value``: stepdistill distill."""

import sys

from stepdistill.__main__ import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
