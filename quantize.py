"""`python quantize.py --model-path ... --output-path ...`: the same as the command `llmquant`."""

import sys

from llmquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
