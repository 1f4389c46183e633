"""``python eval/fid.py calc A B`` is ``stepdistill fid calc A B``."""

import sys

from stepdistill.__main__ import main

main(["fid", *sys.argv[1:]])
