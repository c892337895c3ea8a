import pytest

from tumorjax.evaluation.tables import latex_table, latex_text, write_table
from tumorjax.files import read_csv

ROWS = [
    {"split": "id", "n_real": "60", "dsc": "40.24", "dsc_low": "38.1", "dsc_high": "42.66"},
    {"split": "id", "n_real": 120, "dsc": 51.0, "dsc_low": None, "dsc_high": None},
    {"split": "ood_a", "n_real": 60.0, "dsc": float("nan")},
]
COLUMNS = {"n_real": "#real CT", "dsc": "DSC"}


def test_numbers_intervals_and_what_is_undefined():
    lines = latex_table(ROWS, COLUMNS, "Dice & 95 %").splitlines()
    assert r"\caption{Dice \& 95 \%}" in lines
    assert r"\#real CT & DSC \\" in lines
    assert lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")] == [
        r"60 & 40.2 \scriptsize(38.1--42.7) \\",
        r"120 & 51.0 \\",
        r"60 & -- \\",
    ]


def test_groups_start_blocks_with_their_name():
    text = latex_table(ROWS, COLUMNS, group="split")
    assert text.count(r"\multicolumn{2}{l}") == 2
    assert text.index(r"{l}{id}") < text.index("120 & 51.0") < text.index(r"{l}{ood\_a}")


def test_default_columns_are_table_5_with_specificity():
    row = {"n_real": 60, "patient_sensitivity": 86.4, "false_positives_per_scan": 1.25}
    assert r"60 & 86.4 & -- & -- & -- & -- & -- & 1.2 \\" in latex_table([row])


def test_csv_has_the_same_rows_with_intervals(tmp_path):
    write_table(tmp_path / "table", ROWS, COLUMNS, "caption", group="split")
    back = read_csv(tmp_path / "table.csv")
    assert list(back[0]) == ["split", "n_real", "dsc", "dsc_low", "dsc_high"]
    assert [row["dsc"] for row in back] == ["40.24", "51", ""]
    assert (tmp_path / "table.tex").read_text() == latex_table(ROWS, COLUMNS, "caption", "split")


@pytest.mark.parametrize(
    ("plain", "escaped"),
    [("a_b", r"a\_b"), ("50% & #1", r"50\% \& \#1"), ("\\x", r"\textbackslash{}x")],
)
def test_characters_of_latex_are_escaped(plain, escaped):
    assert latex_text(plain) == escaped
