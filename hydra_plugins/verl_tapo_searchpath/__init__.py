"""Puts ``verl_tapo/conf`` on Hydra's search path, so that ``--config-name tapo`` works with veRL's own entry points."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class VerlTapoSearchPath(SearchPathPlugin):
    """Found by Hydra itself, in the namespace package ``hydra_plugins``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends after everything else: nothing of the user's or veRL's is shadowed."""
        search_path.append(provider="verl-tapo", path="pkg://verl_tapo.conf")
