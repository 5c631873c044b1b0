"""Derives from names which tools take part and how parameters compare, if the setting ``tools`` is
None [ours]."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Names of parameters, without case, underscores and hyphens: `searchQuery` and `search_query` are one.
TEXT_PARAMETERS = frozenset(
    """
    q query queries querylist querystring querytext subqueries subquery textquery userquery
    search searchkeyword searchkeywords searchqueries searchquery searchstring searchterm searchterms searchtext
    keyword keywordlist keywords prompt prompts question questions subquestion subquestions
    """.split()
)
"""They hold words to search for."""
BOX_PARAMETERS = frozenset(
    "bbox bbox2d boundingbox boundingbox2d box box2d cropbbox cropbox rect rectangle roi".split()
)
"""They hold a region of an image."""
REMARK_PARAMETERS = frozenset("explanation justification rationale reason reasoning thought thoughts".split())
"""Parameters in which the model comments on its call. No answer depends on them, so they do not
count."""
BOX_REMARK_PARAMETERS = frozenset("caption comment description goal intent label labels note purpose".split())
"""Comments beside a region of an image. Elsewhere these parameters may say what is looked for."""
# Words in the names of tools. Those that act run, make or change things, or have a state: their answers do not depend
# on the call alone, and the same call is not the same action.
_ACTING = frozenset(
    """
    append bash buy cancel checkout click clicks codeinterpreter commit create creates dblclick delete deletes deploy
    drag draw drawing edit editing editor edits finalanswer generate generates generation generative generator hover
    idle insert inserts install interpret interpreter keyboard kill login logout modify mouse noop notify overwrite
    patch pay powershell purchase push pythoninterpreter remove removes rename replace replaces scroll scrolls send
    sequentialthinking shell sleep swipe tap terminal think thinking tmux transfer update updates upload wait write
    writes
    """.split()
)
# These say the same, or that the tool ends the rollout, unless another word says that it looks something up: `answer`
# but not `answer_lookup`, `run_command` but not `run_search`.
_ACTING_ALONE = frozenset(
    """
    add answer answers apply back book clear close cmd code coding command commands complete completed completion
    computer conclude console copy cp done drop end evaluate exchange exec execute executes execution executor exit
    fill final finalize finish finished focus forward input inputs ipython jupyter key keys message mkdir move msg mv
    order post press put python quit reapply reply respond response return rm run runs save script select set stop
    submission submit submits tab tabs take terminate terminates thought thoughts todo type types typing
    """.split()
)
_LOOKING = frozenset(
    """
    browse check crop detail details detect fetch fetcher find finder get history info information list look lookup ocr
    queries query read reader retrieval retrieve retriever search searcher searches show status view viewer visit zoom
    """.split()
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def acquires_information(tool: str) -> bool:
    """Returns whether a tool takes part if ``tools`` is None. Its name must not say that the tool
    ends the rollout, or runs, makes or changes things."""
    words = {word.lower() for word in _WORD.findall(tool)}
    return words.isdisjoint(_ACTING) and (words.isdisjoint(_ACTING_ALONE) or not words.isdisjoint(_LOOKING))


def default_kernel(parameter: str, beside: Iterable[str] = ()) -> str:
    """The kernel of a parameter when ``tools`` is None, by its name.

    Args:
        parameter: its name.
        beside: names of all the call's parameters.
    """
    name = _plain(parameter)
    if name in TEXT_PARAMETERS:
        return "text"
    if name in BOX_PARAMETERS:
        return "iou"
    about_a_box = name in BOX_REMARK_PARAMETERS and not BOX_PARAMETERS.isdisjoint(map(_plain, beside))
    return "ignore" if about_a_box or name in REMARK_PARAMETERS else "exact"


def _plain(name: Any) -> str:
    return name.lower().replace("_", "").replace("-", "") if isinstance(name, str) else ""
