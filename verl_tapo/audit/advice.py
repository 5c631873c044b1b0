"""What a run's figures warn of, and what to do about it. The thresholds are ours: where it pays to look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from verl_tapo.audit.analysis import Counts
from verl_tapo.audit.sources import Problems
from verl_tapo.audit.units import percent, points
from verl_tapo.rule import figures as meaning
from verl_tapo.rule.figures import ROUNDING
from verl_tapo.settings import TapoSettings

Level: TypeAlias = Literal["info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("info", "warning", "error")

_ENOUGH = 20  # calls, or steps, before a share says something
_UNCLEAR = 0.05


@dataclass
class Tally:
    """What the warnings are drawn from, besides the counts."""

    near_theta: int = 0
    """Failing steps whose best similarity is less than 0.1 below theta."""
    told_by_history: int = 0
    """Calls with an image that is told apart by the calls made before it."""
    calling: int = 0
    """Rollouts read from text that hold a call."""
    unclear: int = 0
    """Those of them whose turns cannot be told apart."""
    judged: tuple[float, float] = (math.inf, -math.inf)
    """The least and the largest value that decided over success, of rollouts read from text."""
    repeated_steps: int = 0
    """Times that a training step came again, from another file."""
    disagreements: int = 0
    """Calls whose recorded outcome is not the rule's."""
    replaced_kernels: Sequence[str] = ()
    """Kernels that records name and that were not used, because a file chooses nothing that is loaded."""


class Warned(NamedTuple):
    """A finding. ``error``: the figures mean nothing, or the run learns nothing; ``warning``: it may do harm."""

    code: str
    level: Level
    text: str
    advice: str


def find_warnings(
    totals: Counts,
    tools: Mapping[str, Counts],
    tally: Tally,
    settings: TapoSettings,
    problems: Problems,
) -> list[dict[str, str]]:
    """All that is worth saying, the gravest first."""
    found = [
        *_about_reading(totals, settings, problems),
        *_about_data(totals, tally),
        *_about_groups(totals, tally, settings),
        *_about_tools(totals, tools, settings),
        *_about_transfer(totals, tally, settings),
        *_about_similarity(tools, settings),
        *_about_grounding(totals),
    ]
    return [warned._asdict() for warned in sorted(found, key=lambda warned: -LEVELS.index(warned.level))]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _beyond(figure: meaning.Figure) -> float:
    return math.inf if figure.beyond is None else figure.beyond


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _about_reading(totals: Counts, settings: TapoSettings, problems: Problems) -> Iterator[Warned]:
    if problems.skipped:
        yield Warned(
            "skipped_lines",
            "error" if problems.skipped > totals["trajectories"] else "warning",
            f"{_counted(problems.skipped, 'line')} could not be read; the figures leave them out.",
            "They are listed under what could not be read. Groups that lost rollouts have other advantages than in "
            "training.",
        )
    if problems.files:
        yield Warned(
            "unread_files",
            "error",
            f"{problems.files:,} files or folders could not be read, or not to their end: the figures are of a part "
            "of the run.",
            "They are listed under what could not be read, with the reason.",
        )
    success, uids, copies, texts = (problems.notes[kind] for kind in ("success", "uid", "copy", "text"))
    if success.lines:
        yield Warned(
            "unread_success",
            "error",
            f"{settings.success_key} of {success.lines:,} rollouts is neither a number nor a truth value "
            f"({success.first}): there the score decided whether they succeeded.",
            "Name the field that says so: --set success_key=..., with score itself where that is meant.",
        )
    if uids.lines:
        yield Warned(
            "foreign_uids",
            "warning",
            f"The uids of {uids.lines:,} lines are no keys of veRL's ({uids.first}): they repeat, or put several "
            "ground truths into one group. Each line counts as a rollout.",
            "Where several dumps were put into one, audit them one by one.",
        )
    if copies.lines:
        yield Warned(
            "copied_lines",
            "warning",
            f"{copies.lines:,} lines stand there twice, uid and all ({copies.first}), and count once.",
            "A dump was appended to itself, or lies there a second time.",
        )
    if texts.lines:
        yield Warned(
            "read_otherwise",
            "info",
            f"{texts.lines:,} lines were read in another way than they are written ({texts.first}).",
            "Bytes that are no UTF-8 show as \N{REPLACEMENT CHARACTER}; the step is that of the file's name where the "
            "line's is no number.",
        )


def _about_data(totals: Counts, tally: Tally) -> Iterator[Warned]:
    rollouts = totals["trajectories"]
    if tally.repeated_steps:
        yield Warned(
            "repeated_steps",
            "warning",
            f"{tally.repeated_steps:,} times a training step came again, from another file.",
            "Their rollouts were taken for those of one step. Audit the files of one run only.",
        )
    if tally.disagreements:
        yield Warned(
            "records_disagree",
            "error",
            f"For {tally.disagreements:,} recorded calls the rule says otherwise than the record.",
            "The records are of another version of verl-tapo, or broken. Please report it where neither is so.",
        )
    if tally.replaced_kernels:
        names = "; ".join(tally.replaced_kernels[:5])
        more = f" and {len(tally.replaced_kernels) - 5} more" if len(tally.replaced_kernels) > 5 else ""
        yield Warned(
            "kernels_not_used",
            "error",
            f"The records name kernels that may load a model or code, and they were not used: {names}{more}.",
            "A file does not choose what is loaded. These parameters were compared as their names suggest, and the "
            "figures are not those of training. To use such kernels name them yourself: --set tools=...",
        )
    if not totals["calls"]:
        yield Warned(
            "no_calls",
            "error",
            f"There is not a single tool call in {int(rollouts):,} rollouts.",
            "Check --format (actor_rollout_ref.rollout.multi_turn.format). A format whose markers are special tokens "
            "cannot be found in dumps, which leave these out: record the run with algorithm.tapo.record_dir.",
        )
        return
    unclear = _share(tally.unclear, tally.calling)
    if unclear > _UNCLEAR:
        yield Warned(
            "turns_unclear",
            "error" if unclear > 0.5 else "warning",
            f"In {tally.unclear:,} of {tally.calling:,} rollouts with calls the turns cannot be told apart: no header "
            "that is known here stands between what the policy wrote and what the tools answered.",
            "Their calls count as unanswered and take no part. This chat template cannot be read from text without "
            "its special tokens: record the run with algorithm.tapo.record_dir.",
        )
    for name, what, advice in (
        ("malformed", "cannot be parsed", "Look at some; where nearly all are, --format is wrong."),
        ("unanswered", "have no answer", "The rollouts end there: response_length or the limits on turns are small."),
    ):
        share = _share(totals[f"{name}_calls"], totals["calls"])
        if share > 0.1 and not (name == "unanswered" and unclear > _UNCLEAR):
            yield Warned(f"{name}_calls", "warning", f"{percent(share)} of the calls {what}.", advice)
    if tally.told_by_history:
        yield Warned(
            "images_from_text",
            "info",
            f"{tally.told_by_history:,} calls refer to images that tools returned, which a text does not show.",
            "Such images count as equal where the image calls before them were equal. Records are exact "
            "(algorithm.tapo.record_dir).",
        )


def _about_groups(totals: Counts, tally: Tally, settings: TapoSettings) -> Iterator[Warned]:
    prompts = totals["prompts"]
    single, right, wrong = (_share(totals[f"{name}_groups"], prompts) for name in ("single", "all_right", "all_wrong"))
    if single > 0.5:
        yield Warned(
            "single_rollouts",
            "error",
            f"{percent(single)} of the prompt groups have one rollout: there are no siblings to learn from.",
            "Is this a validation dump, or is rollout.n 1? Dumps without uid are grouped by equal prompt and ground "
            "truth, which must then be equal to the letter.",
        )
        return
    low, high = tally.judged
    if low < high and totals["successes"] in (0, totals["trajectories"]):
        between = (low + high) / 2
        example = f"={between:g}, for example" if math.isfinite(between) else "=..."
        what = "successes" if totals["successes"] else "failures"
        yield Warned(
            "one_sided_threshold",
            "error",
            f"All {int(totals['trajectories']):,} rollouts count as {what}, though their values "
            f"({settings.success_key} or score) run from {low:g} to {high:g}: success_threshold is "
            f"{settings.success_threshold:g}.",
            f"Set a threshold between them (--set success_threshold{example}), in training too "
            "(algorithm.tapo.success_threshold), or name the field that says whether a rollout succeeded "
            "(success_key).",
        )
        return
    if right + wrong - single > 0.5:
        scored = _share(totals["one_sided_scored_groups"], prompts)
        learnt = f"though scores differ in {percent(scored)}" if scored else "and GRPO learns nothing from them either"
        threshold = f" Is success_threshold = {settings.success_threshold:g} the right one?" if scored else ""
        yield Warned(
            "one_sided_groups",
            "warning",
            f"{percent(wrong)} of the prompt groups are all wrong and {percent(right)} all right: nothing can be "
            f"transferred there, {learnt}.",
            "Easier or harder prompts, more rollouts for each, or filtering such groups (DAPO) give more to learn "
            f"from than any setting of TAPO.{threshold}",
        )


def _about_tools(totals: Counts, tools: Mapping[str, Counts], settings: TapoSettings) -> Iterator[Warned]:
    for tool, counts in tools.items():
        calls = counts["calls"]
        worked = calls - counts["failed_calls"]
        if calls < _ENOUGH or counts["malformed_calls"] == calls:
            continue
        failed = _share(counts["failed_calls"] - counts["unanswered_calls"], calls)
        if failed > _beyond(meaning.named("failed_calls")):
            yield Warned(
                "failing_tool",
                "warning",
                f"{percent(failed)} of the {int(calls):,} calls of {tool} failed.",
                "Look at the answers: a back end that is down teaches the policy to do without the tool.",
            )
        if not settings.rule.takes_part(tool):
            how = "by its name" if settings.rule.tools is None else "because algorithm.tapo.tools does not name it"
            yield Warned(
                "left_out_tool",
                "info",
                f"{tool} takes no part, {how}; it has {int(calls):,} calls.",
                "Tools that gather information belong in algorithm.tapo.tools, tools that run or make things do not.",
            )
        elif worked >= _ENOUGH and totals["successes"] and not counts["witness_steps"]:
            yield Warned(
                "dead_tool",
                "info",
                f"{tool} is never a witness in {int(worked):,} calls that worked.",
                "No rollout succeeds with it. Look at what it returns, and whether the prompts need it.",
            )


def _about_transfer(totals: Counts, tally: Tally, settings: TapoSettings) -> Iterator[Warned]:
    failing, matched = totals["failing_steps"], totals["misassigned_steps"]
    if totals["reference_groups"] and matched >= _ENOUGH:
        lift = totals["lift_sum"] / totals["reference_groups"]
        lucky = _share(totals["lucky_steps"], matched)
        if lift < -ROUNDING or lucky > _beyond(meaning.named("lucky_steps")):
            yield Warned(
                "lucky_witnesses",
                "warning",
                f"{percent(lucky)} of the matched failing calls have lucky witnesses: rollouts that hold the call "
                f"succeed no more often than their prompt group, whose other rollouts do without it (mean lift: "
                f"{points(lift)}).",
                "TAPO can lift wrong calls there, most of all where successes come from guessing. Look at such groups, "
                "reward the use of evidence, watch tapo/lift in training, and compare with a run without TAPO.",
            )
    if failing < _ENOUGH:
        return
    near = _share(tally.near_theta, failing)
    if near > 0.2:
        yield Warned(
            "near_theta",
            "info",
            f"{percent(near)} of the failing calls are less than 0.1 below theta = {settings.rule.theta:g}.",
            "Read some, sorted by similarity, before theta is changed: a smaller theta also equates different calls.",
        )
    if not matched:
        yield Warned(
            "nothing_matches",
            "info",
            "No failing call resembles one of a successful rollout.",
            "TAPO changes nothing here. Where calls look alike to you, give their parameters a kernel in "
            "algorithm.tapo.tools, or try a smaller theta.",
        )
        return
    below = _share(totals["below_alpha_steps"], matched)
    if below > 0.5:
        yield Warned(
            "below_alpha",
            "info",
            f"{percent(below)} of the matched failing calls stay below alpha_min = {settings.rule.alpha_min:g}.",
            "Few of the successful rollouts made these calls. The sweep shows what another alpha_min would do.",
        )


def _about_similarity(tools: Mapping[str, Counts], settings: TapoSettings) -> Iterator[Warned]:
    for tool, counts in tools.items():
        matched = counts["misassigned_steps"]
        inexact = _share(counts["inexact_steps"], matched)
        if matched >= _ENOUGH and inexact > _beyond(meaning.named("inexact_steps")):
            yield Warned(
                "inexact_matches",
                "info",
                f"{percent(inexact)} of the matched failing calls of {tool} are similar to a witness and equal to "
                f"none.",
                f"Read them (filter 'only similar'). Where a letter or a digit makes another action of them, as in "
                f"names, codes and years, raise theta = {settings.rule.theta:g}, or give the parameter the kernel "
                f"exact in algorithm.tapo.tools, which then has to name all tools.",
            )


def _about_grounding(totals: Counts) -> Iterator[Warned]:
    successes, failures, told = (totals[f"told_{name}"] for name in ("successes", "failures", "trajectories"))
    ungrounded = 1 - _share(totals["grounded_successes"], successes)
    if successes >= _ENOUGH and ungrounded > _beyond(meaning.GROUNDED_SUCCESSES):
        yield Warned(
            "ungrounded_successes",
            "info",
            f"{percent(ungrounded)} of the successes are ungrounded: no tool's answer held an accepted answer.",
            "They were guessed, or the model knew. What such a rollout called is a witness by luck; read some (filter "
            "'Grounding: ungrounded'). Where they guess, algorithm.tapo.grounding.luck=true makes failures of them.",
        )
    unread = _share(totals["grounded_failures"], failures)
    if failures >= _ENOUGH and unread > _beyond(meaning.GROUNDED_FAILURES):
        yield Warned(
            "unread_answers",
            "info",
            f"{percent(unread)} {meaning.GROUNDED_FAILURES.sentence}.",
            "Read some (filter 'Grounding: grounded' and 'Rollout: wrong'; the answer is marked). Is it deep in a long "
            "text, cut off, or written otherwise than the reward accepts?",
        )
    never = _share(totals["never_found_trajectories"], told)
    if told >= _ENOUGH and never > _beyond(meaning.NEVER_FOUND):
        yield Warned(
            "never_found",
            "info",
            f"In {percent(never)} of the rollouts no tool's answer held an accepted answer: a search problem.",
            "Look at the queries and at what comes back. Does the index hold the answers, and worded as the data set "
            "accepts them? Questions that take reckoning are never found.",
        )
