"""Whether a text holds an accepted answer: hand-made pairs, and that the quick look misses nothing."""

import re

import numpy as np
import odd_values
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from verl_tapo.answers.evidence import LONGEST_TEXT, Evidence, evidence_of, tells
from verl_tapo.answers.matching import folded, tokens

HELD = [
    ("Kinshasa", "The capital is Kinshasa, on the Congo."),
    ("Kinshasa", "KINSHASA's mayor"),
    ("McDonald's", "McDonald’s opened"),
    ("McDonald's", "McDonald's opened"),
    ("São Paulo", "in Sao  Paulo, Brazil"),
    ("Sao Paulo", "em São Paulo"),
    ("Zu\u0308rich", "Zürich liegt am See"),
    ("Łódź", "born in Lodz"),
    ("Straße des 17. Juni", "die STRASSE des 17. Juni"),
    ("東京", "私は東京に住む"),
    ("ประเทศไทย", "ที่ประเทศไทยนี้"),
    ("서울", "수도는 서울이다"),
    ("كتاب", "كِتَاب"),
    ("1,234,567", "some 1 234 567 people"),
    ("３４５６７", "34567 steps"),
    ("12.50 euros", "it costs 12.5 euros"),
    ("U.S.A. Today", "the USA today said"),
    ("the Nile", "along the Nile River"),
    ("Nile delta", "Nile\ndelta"),
    ("a-ha moment", "an a ha moment"),
]
MISSED = [
    ("Kinshasa", "Kinshasan music"),
    ("York Minster", "Minster York"),
    ("McDonald", "McDonald's opened in 1955 and the McDonalds sold"),
    ("12345", "123456"),
    ("東京", "東の京"),
    ("Lake Como", "the lake of Como"),
    ("Jean-Luc Picard", "Jean Luc and Picard"),
    ("Kinshasa", ""),
]


@pytest.mark.parametrize(("answer", "text"), HELD)
def test_it_is_held(answer, text):
    assert Evidence([answer]).seen_in(text) is True


@pytest.mark.parametrize(("answer", "text"), [pair for pair in MISSED if pair[0] != "McDonald"])
def test_it_is_not_held(answer, text):
    assert Evidence([answer]).seen_in(text) is False


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *dict.fromkeys(
            ["yes", "No.", "7", "1994", "red", "dark blue", "UK", "May", "5 km", "two", "a", "男"], False
        ).items(),
        *dict.fromkeys(
            ["Oslo", "blue whale", "12345", "14 July 1789", "3.5 million", "New York", "日本"], True
        ).items(),
    ],
)
def test_common_answers_tell_nothing(answer, expected):
    assert tells(tokens(answer)) is expected
    evidence = Evidence([answer])
    assert evidence.tells is expected
    assert evidence.seen_in(f"so: {answer}, they say") is (True if expected else None)


def test_one_of_several_names():
    evidence = evidence_of({"target": ["United Kingdom", "UK"]})
    assert evidence.seen_in("in the United Kingdom") is True
    assert evidence.seen_in("in the UK") is None  # "UK" says too little
    assert evidence.seen_in("in France") is False


@pytest.mark.parametrize(
    "ground_truth",
    [
        None,
        "",
        [],
        {},
        {"other": 1},
        {"range": [1, 2]},
        {"target": []},
        "x" * 1000,
        np.array([]),
        object(),
        b"\xff",
        [[[]]],
    ],
)
def test_without_a_readable_answer_nothing_is_told(ground_truth):
    assert evidence_of(ground_truth).seen_in("some text with x in it") is None


@pytest.mark.parametrize(
    "ground_truth",
    ["Kinshasa", ["Kinshasa"], np.array(["Kinshasa"], dtype=object), '["Kinshasa"]', {"target": "Kinshasa"}],
)
def test_the_forms_of_ground_truth(ground_truth):
    assert evidence_of(ground_truth).seen_in("at Kinshasa") is True
    assert evidence_of(ground_truth) is evidence_of(ground_truth)


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("Kinshasa", "Kinshasans say that (Kinshasa) is it, Kinshasa.", "Kinshasa"),
        ("Kinshasa", "the KINSHASA\u2019s mayor", "KINSHASA"),
        ("Sao Paulo", "In São\nPaulo, Brazil", "São\nPaulo"),
        ("1234567", "12345678, or 1,234,567 people", "1,234,567"),
        ("東京", "日本の首都は東京です", "東京"),
        ("C++ language", "C language: the C++ language.", "C++ language"),
        ("Kinshasa", "word " * (LONGEST_TEXT // 5 + 10) + "Kinshasa", None),
        ("Kinshasa", "Lima", None),
        ("yes", "yes", None),
    ],
)
def test_where_it_stands(answer, text, found):
    evidence = Evidence(["another answer", answer])
    place = evidence.place_in(text)
    assert (None if place is None else text[slice(*place)]) == found


@given(
    st.lists(st.sampled_from(["Kinshasa", " ", "a", "\n", "東", "京", "1", ",", ".", "'s", "x" * 50, "É"]), max_size=30)
)
def test_what_is_found_has_a_place(parts):
    text, evidence = "".join(parts), Evidence(["Kinshasa", "東京", "É" * 5])
    place = evidence.place_in(text)
    assert (place is not None) == (evidence.seen_in(text) is True)
    assert place is None or evidence.seen_in(text[slice(*place)]) is True


def test_long_texts_are_searched_up_to_a_limit():
    far = "word " * (LONGEST_TEXT // 5 + 10) + "Kinshasa"
    assert Evidence(["Kinshasa"]).seen_in(far) is None
    assert Evidence(["Kinshasa"]).seen_in("Kinshasa " + far) is True


@pytest.mark.parametrize("name", odd_values.values())
def test_odd_values_are_no_answers_and_raise_nothing(name):
    value = odd_values.values()[name]
    assert evidence_of(value).seen_in("nothing of it") in (None, False)
    if isinstance(value, str):
        assert evidence_of("Kinshasa").seen_in(value) in (None, False)


@pytest.mark.parametrize("name", odd_values.huge_texts())
def test_huge_texts_are_searched(name):
    assert evidence_of("Kinshasa").seen_in(odd_values.huge_texts()[name]) in (None, False)


WORDS = st.sampled_from(
    "the o'brien’s U.S.A. café 1,234 naïve ǅ ŒUVRE straße كِتَاب 東京 -5 <b>x</b> İ ﬁne x² a\u200bb ½ Å".split()
)


@given(st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=8).map(" ".join))
@example("ΑΣ ΑΣΑ")
@example("İstanbul ǰ")
@example("A`A")
def test_the_quick_look_finds_every_word_of_letters(text):
    loose = folded(text)
    for word in tokens(text):
        if re.fullmatch(r"[^\W\d_]+", word):
            assert word in loose, (word, loose)
