"""GRPO and TAPO with the language model: see the quickstart's `compare.py`, whose options it has.

    python examples/quickstart_lm/compare_lm.py --seeds 1 2 3 trainer.save_freq=-1

Runs that are complete are not run again.
"""

import sys

from run_lm import LanguageRun

# isort: split
from compare import main

if __name__ == "__main__":
    sys.exit(main(LanguageRun, __doc__ or ""))
