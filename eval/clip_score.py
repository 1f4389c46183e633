"""``python eval/clip_score.py IMAGES --prompts FILE`` is ``stepdistill fid calc IMAGES --metrics clip ...``."""

import sys

from stepdistill.__main__ import main

main(["fid", "calc", *sys.argv[1:2], "--preset", "coco30k-gigagan", "--metrics", "clip", *sys.argv[2:]])
