"""``verl-tapo audit``: where credit goes wrong in a run, before and after. `audit` is the same from Python."""

from verl_tapo.audit.batches import ReadOptions
from verl_tapo.audit.result import Audit
from verl_tapo.audit.run import audit

__all__ = ["Audit", "ReadOptions", "audit"]
