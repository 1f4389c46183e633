"""``python eval/sample.py PIPELINE REFERENCE`` is ``stepdistill fid gen PIPELINE REFERENCE``: generate and score."""

import sys

from stepdistill.__main__ import main

main(["fid", "gen", *sys.argv[1:]])
