"""Rules that say whether two answers are the same: tables in many languages, and laws."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_tapo.answers.matching import exact, f1, in_range, numbers, substring, tokens

SAME = [
    # English
    ("The Beatles", "beatles"),
    ("  “Paris.” ", "Paris"),
    ("**Paris**", "Paris"),
    ("the United States", "United States"),
    ("U.S.A.", "USA"),
    ("J. R. R. Tolkien", "J.R.R. Tolkien"),
    ("O’Brien", "O'Brien"),
    ("twenty-one", "twenty one"),
    ("ＡＢＣ　１２", "abc 12"),
    ("ﬁre", "fire"),
    # French
    ("L’Oréal", "l'oreal"),
    ("la tour Eiffel", "Tour Eiffel"),
    ("l'œuvre", "Oeuvre"),
    ("Les Misérables", "MISERABLES"),
    # German
    ("Die Straße", "strasse"),
    ("das Brandenburger Tor", "Brandenburger Tor"),
    ("ein Fahrrad", "Fahrrad"),
    # Spanish, Portuguese, Italian
    ("El Niño", "nino"),
    ("los Ángeles", "Angeles"),
    ("São Tomé e Príncipe", "Sao Tome e Principe"),
    ("Il Gattopardo", "Gattopardo"),
    ("Un'altra vita", "altra vita"),
    # Polish, Norwegian, Turkish, Vietnamese
    ("Łódź", "Lodz"),
    ("Tromsø", "Tromso"),
    ("İstanbul", "istanbul"),
    ("Diyarbakır", "DIYARBAKIR"),
    ("Hồ Chí Minh", "Ho Chi Minh"),
    # Russian, Greek
    ("Пётр Чайковский", "Петр Чайковский"),
    ("Толсто́й", "Толстой"),
    ("Αθήνα", "ΑΘΗΝΑ"),
    # Arabic, Persian, Hebrew
    ("الْقَاهِرَة", "القاهرة"),
    ("القـــاهرة", "القاهرة"),
    ("أحمد", "احمد"),
    ("می\u200cخواهم", "می‌خواهم".replace("\u200c", "")),
    ("کتاب", "كتاب"),
    ("שָׁלוֹם", "שלום"),
    # Chinese, Japanese, Korean, Thai
    ("巴黎 圣母院", "巴黎圣母院。"),
    ("レオナルド・ダ・ヴィンチ", "レオナルドダヴィンチ"),
    ("ﾄｳｷｮｳ", "トウキョウ"),
    ("서울 특별시", "서울특별시"),
    ("กรุงเทพ มหานคร", "กรุงเทพมหานคร"),
    # numbers
    ("1,234,567", "1234567"),
    ("1.234.567", "1234567"),
    ("1\u202f234\u00a0567", "1 234 567"),
    ("1'234'567", "1234567"),
    ("12,34,567", "1234567"),
    ("1.234.567,89", "1,234,567.89"),
    ("1 234,5", "1234.5"),
    ("3,5 km", "3.5 km"),
    ("١٢٣٫٥", "123.5"),
    ("١٬٢٣٤", "1,234"),
    ("१२३", "123"),
    ("２０２０年", "2020年"),
    ("-5 °C", "−5°C"),
    ("50 %", "50%"),
    ("$1,234.50", "$ 1234.50"),
    ("8,849 m", "8849m"),
    ("+5", "5"),
    # equal numbers
    ("3.50", "3.5"),
    ("3,50 €", "3.5 €"),
    ("$5.00", "$5"),
    ("1,000.00", "1000"),
    ("1 234,50", "1234.5"),
    ("12.0", "12"),
    (".5", "0.5"),
    ("0,500", "0.5"),
    ("-.50", "-0.5"),
    ("٣٫٥٠", "3.5"),
    ("In 2020 1,234 people", "in 2020 1234 people"),
    # signs, whichever character they are
    ("–5", "-5"),
    ("—5 °C", "-5 °C"),
    ("‒5", "−5"),
    ("‐5", "-5"),
    ("- 5 °C", "-5 °C"),
    ("minus 5 °C", "-5 °C"),
    ("−$5", "$-5.00"),
    ("Cl⁻", "Cl-"),
    ("Cl–", "Cl-"),
    ("(O−)", "O-"),
    ("< 5", "<5"),
    ("<= 5", "≤5"),
    ("+/-5", "±5"),
    ("F♯", "F#"),
    # dashes and the like that are none
    ("1914–1918", "1914-1918"),
    ("$10–$20", "$10-$20"),
    ("Paris – the capital", "Paris, the capital"),
    ("Paris– the capital", "Paris, the capital"),
    ("Paris—the capital", "Paris, the capital"),
    ("Paris- the capital", "Paris, the capital"),
    ("5 ٪", "5%"),
    ("-> 5", "5"),
    ("5′10″", "5'10\""),
    ("10⁶", "10^6"),
    ("1½", "1 1/2"),
    ("km²", "km2"),
    # dates, written alike
    ("2020-05-12", "2020/05/12"),
    ("May 12, 2020", "may 12 2020"),
    # only signs
    ("?", " ? "),
]

DIFFERENT = [
    ("Vitamin A", "Vitamin"),
    ("A", "The"),
    ("A 7", "7"),
    ("I", "1"),
    ("1 2", "12"),
    ("10-5", "105"),
    ("-5", "5"),
    ("5%", "5"),
    ("$5", "€5"),
    ("C++", "C"),
    ("C#", "C"),
    ("3.5", "35"),
    ("3,5", "35"),
    ("1.234", "1234"),
    ("3.142", "3142"),
    ("1,2,3", "123"),
    ("12.05.2020", "12052020"),
    ("2020-05-12", "20200512"),
    ("12 March 1999", "1 2 March 1999"),
    ("1,234,56", "123456"),
    ("2020 100 200", "2020100200"),
    ("–5", "5"),
    ("—5", "5"),
    ("‒5", "5"),
    ("- 5", "5"),
    ("minus 5", "5"),
    ("-$5", "$5"),
    ("–.5", ".5"),
    ("A-", "A"),
    ("A-", "A+"),
    ("O-", "O"),
    ("Cl-", "Cl"),
    ("Na+", "Na"),
    ("B♭", "B"),
    ("<5", ">5"),
    ("< 5", "5"),
    ("<$5", "$5"),
    ("<5", "≤5"),
    ("±5", "5"),
    ("±5", "-5"),
    ("≠5", "5"),
    ("√2", "2"),
    ("Cl- ions", "Cl ions"),
    ("HCO3- ions", "HCO3 ions"),
    ("5٪", "5"),
    ("5‰", "5"),
    ("5'10\"", "510"),
    ("5′10″", "510"),
    ("10⁶", "106"),
    ("1½", "11/2"),
    ("2¹⁰⁰", "2100"),
    ("100–200", "100200"),
    ("3.05", "3.5"),
    ("100", "1"),
    ("1.1.0", "1.1"),
    ("AT&T", "ATT"),
    ("thé vert", "vert"),
    ("là-bas", "bas"),
    ("йод", "иод"),
    ("がく", "かく"),
    ("北京", "南京"),
    ("कि", "की"),
    ("नमस्ते", "नमसते"),
    ("?", "!"),
    ("👍", "👎"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_exact_same(one, other):
    assert exact(tokens(one), tokens(other))
    assert exact(tokens(other), tokens(one))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_exact_different(one, other):
    assert not exact(tokens(one), tokens(other))
    assert not exact(tokens(other), tokens(one))


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("Paris, France", "Paris"),
        ("It is Paris", "paris"),
        ("La ville de Paris", "Paris"),
        ("答案是巴黎", "巴黎"),
        ("東京です", "東京"),
        ("서울은", "서울"),
        ("عاصمة مصر القَاهِرة", "القاهرة"),
        ("in Москве", "Москве"),
        ("8,849 m", "8849"),
        ("it costs $5.00", "$5"),
        ("about -.5 degrees", "-0.5"),
        ("der Fluss Rhein", "der Rhein"),
    ],
)
def test_substring_found(answer, accepted):
    assert substring(tokens(answer), tokens(accepted), 3.0)


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("London, Paris, Rome, Berlin", "Paris"),
        ("伦敦巴黎罗马柏林", "巴黎"),
        ("서울 부산 대구 인천", "서울"),
        ("القاهرة أو دمشق أو بيروت", "القاهرة"),
        ("15", "5"),
        ("3.5", "5"),
        ("-5", "5"),
        ("–5 °C", "5"),
        ("minus 5 degrees", "5"),
        ("less: < 5 kg", "5"),
        ("a grade of A-", "A"),
        ("Parisian", "Paris"),
        ("Paris", "Paris, France"),
        ("York, New", "New York"),
    ],
)
def test_substring_refused(answer, accepted):
    assert not substring(tokens(answer), tokens(accepted), 3.0)


@pytest.mark.parametrize(
    ("answer", "accepted", "value"),
    [
        ("Barack Hussein Obama", "Barack Obama", 0.8),
        ("the Eiffel Tower", "Eiffel Tower in Paris", 2 / 3),
        ("La torre Eiffel", "torre Eiffel", 1.0),
        ("北京市", "北京", 0.8),
        ("東京", "京都", 0.5),
        ("서울시", "서울", 0.8),
        ("Лев Толстой", "Толстой", 2 / 3),
        ("نهر النيل", "النيل", 2 / 3),
        ("well well well", "well", 0.5),
        ("Rome", "Paris", 0.0),
    ],
)
def test_f1(answer, accepted, value):
    assert f1(tokens(answer), tokens(accepted)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "low", "high"),
    [
        ("330", 291.6, 356.4),  # of 324
        ("291.6", 291.6, 356.4),
        ("about 330 m, I think", 291.6, 356.4),
        ("330m", 291.6, 356.4),
        ("高330米", 291.6, 356.4),
        ("1,330.5", 1300, 1400),
        ("300 to 340 m", 291.6, 356.4),
        ("300–340", 291.6, 356.4),
        ("290–400", 291.6, 356.4),  # half of both together
        ("–5 °C", -5.5, -4.5),
        ("1", 0.9, 1.1),
        ("0", 0, 0),
        ("330, not 17", 291.6, 356.4),  # no range: the first counts
        ("3e2", 291.6, 356.4),
    ],
)
def test_numbers_in_a_range(answer, low, high):
    assert in_range(answer, low, high)


@pytest.mark.parametrize(
    ("answer", "low", "high"),
    [
        ("357", 291.6, 356.4),
        ("-330", 291.6, 356.4),
        ("5 °C", -5.5, -4.5),
        ("200–600", 291.6, 356.4),
        ("2 towers of 324 m", 291.6, 356.4),  # the benchmark reads a range, too
        ("0 to 10000", 291.6, 356.4),
        ("none", 0, 0),
        ("three hundred and thirty", 291.6, 356.4),
        ("9" * 400, 291.6, 356.4),
        ("1e999 to -1e999", 0, 1),
    ],
)
def test_numbers_that_are_not_in_a_range(answer, low, high):
    assert not in_range(answer, low, high)


def test_numbers_of_an_answer():
    assert numbers("from 1,234.50 to 2 000 000 or −7, 3-4") == [1234.5, 2e6, -7, 3, 4]


@pytest.mark.parametrize("unit", [" 111", ",111", ".111", "'111", ",11", "1", "1.", " 1,", "- ", "<", " minus"])
def test_reading_takes_no_more_than_linear_time(unit):
    """Eight times the text takes about eight times the time, not sixty-four times."""

    def seconds(count):
        text = f"1 111{unit * count}!"
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            tokens(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(16_000) < 30 * max(seconds(2_000), 1e-3)


TEXTS = st.text(max_size=40) | st.text(alphabet="aL'Eé1,. -%中がأ", max_size=20)


@given(TEXTS)
def test_every_answer_is_itself_and_nothing_is_nothing(text):
    once = tokens(text)
    assert bool(once) == bool(text.strip("\u0640").strip())
    if once:
        assert f1(once, once) == 1.0
        assert substring(once, once, 1.0)


@given(TEXTS, TEXTS)
def test_comparing_is_symmetric_and_bounded(one, other):
    one, other = tokens(one), tokens(other)
    assert exact(one, other) == exact(other, one)
    assert f1(one, other) == f1(other, one)
    assert 0.0 <= f1(one, other) <= 1.0


@given(TEXTS, TEXTS, st.floats(1, 5), st.floats(1, 5))
def test_a_longer_bound_refuses_no_more(answer, accepted, ratio, more):
    if substring(tokens(answer), tokens(accepted), ratio):
        assert substring(tokens(answer), tokens(accepted), ratio * more)
