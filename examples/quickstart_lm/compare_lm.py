"""GRPO and TAPO with the language model: see the quickstart's `compare.py`, whose options it has.

    python examples/quickstart_lm/compare_lm.py trainer.save_freq=-1 trainer.test_freq=10 --steps 10 --seeds 1 2 3

That saves no checkpoints, and asks held-out questions before and after only. Runs that are complete are not run again.
"""

import sys

from run_lm import LanguageRun

# isort: split
from compare import main

if __name__ == "__main__":
    sys.exit(main(LanguageRun, __doc__ or ""))
