"""``python eval/reference.py IMAGES --out FILE`` is ``stepdistill fid ref IMAGES --out FILE``."""

import sys

from stepdistill.__main__ import main

main(["fid", "ref", *sys.argv[1:]])
