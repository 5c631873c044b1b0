"""The per-step records: what is written in training is what is read, and nothing about them ends a run."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import re
import threading

import numpy as np
import odd_values
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_tapo import TapoConfig, transfer_credit
from verl_tapo.audit import audit
from verl_tapo.records import CallRecord, TrajectoryRecord
from verl_tapo.rule.config import Grounding
from verl_tapo.rule.steps import ToolStep
from verl_tapo.selftest.random_batches import random_batch, random_config
from verl_tapo.settings import TapoSettings
from verl_tapo.step_records import (
    StepRecorder,
    StepSnapshot,
    check_folder,
    is_step_records,
    json_value,
    read_step_records,
)

FORMATS = {"jsonl": "jsonl.gz", "parquet": "parquet"}


def snapshot(seed=0, step=1, part=0, batch=None, rule=None, **changes):
    base, mask, index, success, steps = batch or random_batch(seed)
    # Under a group estimator, which is what the audit assumes, a row has one advantage.
    base = base.mean(1, keepdim=True).expand_as(base).contiguous()
    rule = rule or (random_config(seed) if batch is None else TapoConfig())
    steps = sorted(steps, key=lambda s: (s.row, s.turn, s.call))
    rows = len(base)
    advantages, report = transfer_credit(base, mask, index, success, steps, rule, recognisable=np.arange(rows) % 3 == 0)
    made = StepSnapshot(
        step=step,
        part=part,
        settings=TapoSettings(rule=rule),
        metrics={**report.metrics(), "tapo/ms/base": 1.0},
        keys=[f"{uid}_{row}_0" for row, uid in enumerate(index)],
        index=index,
        trajectory=np.arange(rows),
        scores=np.asarray(success, dtype=np.float64),
        success=np.asarray(success, dtype=bool),
        padding=np.zeros(rows, dtype=bool),
        lengths=np.full(rows, base.shape[1]),
        response_mask=mask,
        changed=(advantages != base).sum(-1).numpy(),
        steps=steps,
        report=report,
        records=[None] * rows,
    )
    return dataclasses.replace(made, **changes)


def write(folder, *snapshots, **options):
    recorder = StepRecorder(folder, **options)
    for made in snapshots:
        recorder.take(made)
        recorder.flush()
    return recorder


@pytest.mark.long
@pytest.mark.parametrize("record_format", FORMATS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, record_format, seed):
    made = snapshot(seed, step=seed)
    recorder = write(tmp_path, made, record_format=record_format)
    assert recorder.lost == 0
    path = tmp_path / f"{seed:06d}.{FORMATS[record_format]}"
    assert is_step_records(path)
    header, rows, problems = read_step_records(path)
    assert problems == []
    assert (header["step"], TapoSettings.from_mapping(header["settings"])) == (seed, made.settings)
    assert header["metrics"] == {k: v for k, v in made.metrics.items() if k != "tapo/ms/base"}
    assert [row["uid"] for row in rows] == [str(uid) for uid in made.index]
    assert [row["key"] for row in rows] == made.keys
    assert [row["tokens"] for row in rows] == made.response_mask.sum(-1).tolist()
    assert [row["changed_tokens"] for row in rows] == made.changed.tolist()
    assert [row["recognisable"] for row in rows] == [number % 3 == 0 for number in range(len(rows))]
    calls = [(row, call) for row, line in enumerate(rows) for call in line["calls"]]
    assert len(calls) == len(made.steps)
    place = [
        (row, sum(other.row == row for other in made.steps[:k])) for k, row in enumerate(s.row for s in made.steps)
    ]
    for (row, call), step, credit in zip(calls, made.steps, made.report.steps, strict=True):
        assert (row, call["tool"], call["arguments"]) == (step.row, step.tool, json_value(step.arguments))
        assert (tuple(call["turn"]), tuple(call["call"]), call["ok"]) == (step.turn, step.call, step.ok)
        assert call["turn_tokens"] == int(made.response_mask[row, slice(*step.turn)].sum())
        for name in ("role", "gate", "similarity", "support", "alpha", "reference_advantage", "transfer"):
            assert call[name] == getattr(credit, name)
        assert call["witness"] == (None if credit.witness is None else list(place[credit.witness]))


@pytest.mark.parametrize("grounding", [Grounding(), Grounding(witnesses=True, own=True, luck=True)])
@pytest.mark.parametrize("record_format", FORMATS)
@pytest.mark.parametrize("seed", range(12))
def test_an_audit_of_them_says_what_training_logged(tmp_path, record_format, seed, grounding):
    rule = TapoConfig(grounding=grounding)
    made = [snapshot(batch=random_batch(seed * 100 + step), rule=rule, step=step) for step in range(3)]
    write(tmp_path, *made, record_format=record_format)
    result = audit(tmp_path).result
    assert result["warnings"] == [w for w in result["warnings"] if w["code"] != "records_disagree"]
    assert result["settings"]["recorded_steps"] == 3
    for figures, wrote in zip(result["steps"], made, strict=True):
        for name in ("misassigned", "corrected"):
            share = figures[f"{name}_steps"] / max(figures["failing_steps"], 1)
            assert share == pytest.approx(wrote.metrics[f"tapo/{name}_steps"], abs=1e-12)
        assert figures["token_share"] == pytest.approx(wrote.metrics["tapo/token_share"], abs=1e-12)
        for name in ("similarity", "support", "alpha", "transfer", "lift", "reference_advantage"):
            assert figures[name] == pytest.approx(wrote.metrics.get(f"tapo/{name}"), abs=1e-12)


def test_padding_is_left_out_and_witnesses_still_point_right(tmp_path):
    batch = random_batch(5, rows=12)
    made = snapshot(batch=batch)
    padding = np.zeros(12, dtype=bool)
    empty = sorted(set(range(12)) - {s.row for s in made.steps})
    padding[empty[:2]] = True
    assert padding.any()
    write(tmp_path, dataclasses.replace(made, padding=padding))
    _, rows, _ = read_step_records(tmp_path / "000001.jsonl.gz")
    assert len(rows) == 12 - padding.sum()
    pairs = [(call, call["witness"]) for row in rows for call in row["calls"] if call["witness"]]
    assert pairs
    for call, (row, number) in pairs:
        witness = rows[row]["calls"][number]
        assert (witness["role"], witness["tool"]) == ("witness", call["tool"])


def test_what_the_agent_loop_recorded_stands_beside(tmp_path):
    step = ToolStep(0, "search", {"query": "a"}, (0, 3), (1, 3), False)
    beyond = CallRecord("search", {"query": "b"}, (9, 12), (9, 12), "ok")
    record = TrajectoryRecord([CallRecord("search", {"query": "a"}, (0, 3), (1, 3), "timeout", 30.0), beyond])
    batch = (torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.int64), ["u"], [False], [step])
    write(tmp_path, snapshot(batch=batch, records=[record.to_dict()]))
    (call,) = read_step_records(tmp_path / "000001.jsonl.gz").rows[0]["calls"]
    assert (call["status"], call["latency_s"], call["fault"]) == ("timeout", 30.0, "infrastructure")


def test_nothing_that_a_model_wrote_is_too_much(tmp_path):
    deep = []
    for _ in range(5000):
        deep = [deep]
    odd = {
        "deep": deep,
        "a": float("nan"),
        "b": "\ud800",
        "c": [{"d": object()}],
        "e": 10**30,
        "f": np.float32(1.5),
        "": None,
    }
    step = ToolStep(0, "tool\ud800", odd, (0, 3), (1, 3), True)
    batch = (torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.int64), ["u"], [False], [step])
    for record_format, suffix in FORMATS.items():
        assert write(tmp_path, snapshot(batch=batch), record_format=record_format).lost == 0
        (call,) = read_step_records(tmp_path / f"000001.{suffix}").rows[0]["calls"]
        assert audit(tmp_path / f"000001.{suffix}").result["totals"]["calls"] == 1
        assert call["arguments"]["a"] is None
        assert (call["arguments"]["b"], call["arguments"]["f"]) == ("\ud800", 1.5)


@pytest.mark.parametrize("record_format", FORMATS)
def test_odd_values_are_recorded(tmp_path, record_format):
    values = odd_values.values()
    del values["branches without end"]  # no text of a model is such a value: it is one object in many places
    steps = [
        ToolStep(0, "search", {name: value, "keys": {name: value}}, (0, 3), (1, 3)) for name, value in values.items()
    ]
    steps.append(ToolStep(0, "search", {10**5000: 1, None: 2, "\ud800": 3}, (0, 3), (1, 3)))
    batch = (torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.int64), ["u"], [False], steps)
    assert write(tmp_path, snapshot(batch=batch), record_format=record_format).lost == 0
    path = tmp_path / f"000001.{FORMATS[record_format]}"
    calls = read_step_records(path).rows[0]["calls"]
    assert len(calls) == len(steps)
    assert next(call for call in calls if "text" in call["arguments"])["arguments"]["text"] == "capital of France"
    assert audit(path).result["totals"]["calls"] == len(steps)


def test_a_step_that_is_done_again_takes_the_place_of_the_old_one(tmp_path):
    write(tmp_path, snapshot(1, step=7), snapshot(2, step=8))
    write(tmp_path, snapshot(3, step=7), snapshot(4, step=7, part=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000007.jsonl.gz",
        "000007_1.jsonl.gz",
        "000008.jsonl.gz",
    ]
    expected = [str(uid) for uid in snapshot(3).index]
    assert [row["uid"] for row in read_step_records(tmp_path / "000007.jsonl.gz").rows] == expected


def test_what_an_earlier_run_left_of_a_step_is_removed(tmp_path):
    write(tmp_path, snapshot(1, step=7), snapshot(2, step=7, part=1), snapshot(3, step=8), record_format="parquet")
    write(tmp_path, snapshot(4, step=7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000007.jsonl.gz", "000008.parquet"]


def test_after_a_resumption_the_steps_of_the_run_before_go_first(tmp_path):
    write(tmp_path, *(snapshot(step, step=step) for step in (13, 14, 15)), keep=3)
    write(tmp_path, snapshot(0, step=11), snapshot(1, step=12), keep=3)
    names = ["000011.jsonl.gz", "000012.jsonl.gz", "000015.jsonl.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_only_the_newest_steps_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, *(snapshot(step, step=step) for step in range(1, 12)), snapshot(0, step=11, part=1), keep=2)
    names = ["000010.jsonl.gz", "000011.jsonl.gz", "000011_1.jsonl.gz", "notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def foreign(path, content):
    """A file of somebody else's: compressed dumps, a shard of a data set, or what else may bear such a name."""
    if content == "dumps":
        path.write_bytes(gzip.compress(b'{"input": "a", "output": "b", "score": 1.0}\n'))
    elif content == "shard":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    elif content == "folder":
        path.mkdir()
        (path / "part-0").write_text("rows")
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "nothing":
        path.touch()
    elif content == "text":
        path.write_text("not compressed")
    return path


def contents(folder):
    """Every plain file of a folder, byte by byte, and the names of all else."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


FOREIGN = [
    ("1.jsonl.gz", "dumps"),
    ("000001.jsonl.gz", "dumps"),
    ("000001.jsonl.gz", "text"),
    ("000001.jsonl.gz", "nothing"),
    ("000001.jsonl.gz", "pipe"),
    ("00001.parquet", "shard"),
    ("000001.parquet", "shard"),
    ("000001_1.parquet", "shard"),
    ("000007.parquet", "folder"),
]


@pytest.mark.parametrize(("name", "content"), FOREIGN)
def test_a_folder_with_files_of_others_is_refused_at_the_start(tmp_path, name, content):
    foreign(tmp_path / name, content)
    before = contents(tmp_path)
    for start in (check_folder, StepRecorder, lambda folder: check_folder(folder, make=False)):
        with pytest.raises(ValueError, match=rf"record_dir=.* holds {re.escape(name)}, .*move it away"):
            start(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("record_format", FORMATS)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize(("name", "content"), FOREIGN)
def test_a_file_of_another_s_that_comes_later_is_never_touched(tmp_path, caplog, record_format, keep, name, content):
    recorder = StepRecorder(tmp_path, record_format, keep)
    path = foreign(tmp_path / name, content)
    before = contents(tmp_path)
    for step in (1, 2, 1, 7):
        recorder.take(snapshot(step, step=step))
        recorder.flush()
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    in_the_way = {f"{step:06d}.{FORMATS[record_format]}" for step in (1, 7)} & {name}
    assert (recorder.lost > 0) == bool(in_the_way)
    if in_the_way:
        assert f"{path} is there already and holds no step records" in caplog.text
    last = f"000007.{FORMATS[record_format]}"
    assert is_step_records(tmp_path / last) == (last not in in_the_way)


def test_records_under_other_names_or_of_other_steps_are_not_our_own(tmp_path):
    """Somebody's copies: `1.jsonl.gz` of step 1, and step 1 kept under the name of step 2."""
    write(tmp_path / "kept", snapshot(1))
    kept = (tmp_path / "kept" / "000001.jsonl.gz").read_bytes()
    for name in ("1.jsonl.gz", "000002.jsonl.gz"):
        folder = tmp_path / name.partition(".")[0]
        recorder = StepRecorder(folder)
        folder.mkdir()
        (folder / name).write_bytes(kept)
        for step in (1, 2):
            recorder.take(snapshot(step, step=step))
            recorder.flush()
        assert (folder / name).read_bytes() == kept
        with pytest.raises(ValueError, match="move it away"):
            check_folder(folder)


def test_a_run_that_was_killed_while_it_wrote_goes_on(tmp_path):
    """Its own files are no others' files, and what it left half written is written anew."""
    write(tmp_path, snapshot(1), snapshot(2, step=2))
    (tmp_path / ".000003.jsonl.gz.partial").write_bytes(b"\x1f\x8b\x08half")
    check_folder(tmp_path)
    recorder = write(tmp_path, snapshot(4, step=2), snapshot(3, step=3))
    assert recorder.lost == 0
    assert sorted(contents(tmp_path)) == [f"00000{step}.jsonl.gz" for step in (1, 2, 3)]
    assert len(read_step_records(tmp_path / "000002.jsonl.gz").rows) == len(snapshot(4).index)


class TestTrouble:
    def test_a_folder_that_cannot_be_written_to_ends_nothing(self, tmp_path, caplog):
        (tmp_path / "file").write_text("in the way")
        with caplog.at_level(logging.WARNING, "verl_tapo"):
            recorder = write(tmp_path / "file", snapshot(1), snapshot(2, step=2))
        assert recorder.lost == 1.0
        assert len(caplog.records) == 1
        assert "could not be written" in caplog.text
        (tmp_path / "file").unlink()
        recorder.take(snapshot(3, step=3))
        recorder.flush()
        assert recorder.lost == pytest.approx(2 / 3)
        assert (tmp_path / "file" / "000003.jsonl.gz").exists()

    def test_half_a_file_is_never_left(self, tmp_path):
        broken = dataclasses.replace(snapshot(1), records=None)  # whatever goes wrong in the middle
        assert write(tmp_path, broken).lost == 1.0
        assert list(tmp_path.iterdir()) == []

    def test_steps_do_not_pile_up(self, tmp_path, monkeypatch, caplog):
        go = threading.Event()
        monkeypatch.setattr("verl_tapo.step_records._write_lines", lambda path, _: (go.wait(30), path.touch()))
        recorder = StepRecorder(tmp_path)
        with caplog.at_level(logging.WARNING, "verl_tapo"):
            for step in range(5):
                recorder.take(snapshot(step, step=step))  # does not wait
        go.set()
        recorder.flush()
        assert recorder.lost == 3 / 5
        assert "still being written" in caplog.text
        assert len(list(tmp_path.iterdir())) == 2

    def test_the_folder_is_tried_before_the_run(self, tmp_path):
        check_folder(tmp_path / "deep" / "er")
        assert list((tmp_path / "deep" / "er").iterdir()) == []
        check_folder(tmp_path / "not" / "made", make=False)
        assert not (tmp_path / "not").exists()
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"record_dir=.*file cannot be written to"):
            check_folder(tmp_path / "file")
        for place in (tmp_path / "file" / "below", "/proc/nowhere", "/dev/null"):
            with pytest.raises(ValueError, match=r"record_dir=.* cannot be written to"):
                check_folder(place, make=False)

    def test_broken_lines_are_told(self, tmp_path):
        write(tmp_path, snapshot(1))
        path = tmp_path / "000001.jsonl.gz"
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        plain = tmp_path / "000001.jsonl"
        plain.write_text("\n".join([lines[0], lines[1], '{"uid": 1}', lines[2][:40]]))
        header, rows, problems = read_step_records(plain)
        assert (header["step"], len(rows)) == (1, 1)
        assert problems == [(3, "not a row of step records"), (4, "not JSON")]
        assert [p["line"] for p in audit(plain).result["problems"]] == [3, 4]
        path.write_bytes(path.read_bytes()[:-20])
        assert "breaks off" in read_step_records(path).problems[-1][1]

    @pytest.mark.parametrize("record_format", FORMATS)
    def test_damaged_files_end_no_audit(self, tmp_path, record_format):
        write(tmp_path, snapshot(1), snapshot(2, step=2), record_format=record_format)
        path = tmp_path / f"000002.{FORMATS[record_format]}"
        data = bytearray(path.read_bytes())
        hurt = slice(20, 80) if record_format == "parquet" else slice(len(data) * 2 // 3, len(data) - 20)
        data[hurt] = bytes(len(data[hurt]))
        path.write_bytes(data)
        (tmp_path / "000003.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00" + b"\xff" * 40)
        result = audit(tmp_path).result
        assert result["steps"][0]["step"] == 1
        assert str(path) in [p["file"] for p in result["problems"]]
        assert str(tmp_path / "000003.jsonl.gz") in [p["file"] for p in result["problems"]]

    def test_other_files(self, tmp_path):
        other = tmp_path / "1.jsonl"
        for text in ("", '{"output": "x"}', "\x00\xff"):
            other.write_text(text)
            assert not is_step_records(other)
            with pytest.raises(ValueError, match="no step records"):
                read_step_records(other)
        newer = tmp_path / "2.jsonl"
        newer.write_text(json.dumps({"kind": "tapo_step_records", "version": 2}))
        with pytest.raises(ValueError, match="version 2, expected 1"):
            read_step_records(newer)
        with pytest.raises(ValueError, match="version 2, expected 1"):
            audit(newer)  # the only file: nothing could be read
        assert not is_step_records(tmp_path / "nowhere.parquet")
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        assert not is_step_records(tmp_path / "x.parquet")


def test_without_pyarrow_json_lines_are_written(tmp_path):
    import subprocess
    import sys

    code = "import sys; sys.modules['pyarrow'] = None; import verl_tapo.step_records, verl_tapo.trainer.estimator"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"record_dir": ""}, "record_dir must be a folder"),
        ({"record_dir": 3}, "record_dir must be a folder"),
        ({"record_format": "csv"}, "record_format"),
        ({"record_keep": -1}, "record_keep must be a whole number"),
        ({"record_keep": True}, "record_keep must be a whole number"),
    ],
)
def test_settings(given, message):
    with pytest.raises(ValueError, match=message):
        TapoSettings.from_mapping(given)
