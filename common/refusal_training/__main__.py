"""python -m common.refusal_training [--output FILE]: trains the learned part of the refusal judge again."""

import argparse
from pathlib import Path

from common.refusal_model import PATH
from common.refusal_training.training import build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PATH)
    build(parser.parse_args().output)
