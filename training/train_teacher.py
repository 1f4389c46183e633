"""``python training/train_teacher.py --config configs/teacher_digits.yaml key=value``: stepdistill teacher."""

import sys

from stepdistill.__main__ import main

if __name__ == "__main__":
    main(["teacher", *sys.argv[1:]])
