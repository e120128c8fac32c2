"""The report: it stands alone, has the paper's numbers, and escapes names of studies and rows."""

from __future__ import annotations

import csv
import dataclasses
import html
import re
from pathlib import Path

from openpae.study.correlations import Point
from openpae.study.page import numbers, ranks, reached, study_page, study_text, verdicts
from openpae.study.plan import Plan
from openpae.study.settings import Claim, StudyRow
from openpae.study.table import epochs_until, write_table
from tests.study.conftest import read, result, tiny


def test_the_report_stands_alone_and_names_the_papers_numbers(done: Plan) -> None:
    page = (done.layout.out / "tiny" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="http', page)
    for text in ("(0.35)", "(1.86)", "gFD", "one seed, which has no error bar", "agrees", "pae study tiny"):
        assert text in page
    assert page.count("data:image/png;base64,") == 2  # a strip of samples for each row
    assert str(done.layout.out) not in page


def test_the_tables_are_markdown_too(done: Plan) -> None:
    """The table has the numbers of results.csv, and all its lines have equally many cells."""
    text = (done.layout.out / "tiny" / "results.md").read_text(encoding="utf-8")
    (line,) = (r for r in read(done) if (r["row"], r["metric"], r["step"]) == ("none", "gfid", "4"))
    (row,) = re.findall(r"^\| none \| 1 \|.*$", text, re.M)
    assert f"| {float(line['value']):.2f} " in row
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M):
        assert len({cells.count("|") for cells in table.splitlines()}) == 1
    assert "agrees: one seed, which has no error bar" in text


def test_epochs_until_a_level_of_gfd(done: Plan) -> None:
    """Batches of the tiny generator over the ten drawn images; curves are linear between two and four."""
    study = tiny(until=(15.0, 1.0))
    results = [
        dataclasses.replace(result(study, study.rows[0], 0, value), step=step)
        for step, value in ((2, 20.0), (4, 10.0))
    ]
    (run, *_) = [run for run in done.runs if run.row == study.rows[0].name]
    assert run.generator is not None
    size = done.stages[run.generator].settings.loop.global_batch_size
    assert epochs_until(done, study, results, 15.0) == {study.rows[0].name: {0: 3 * size / 10}}
    assert epochs_until(done, study, results, 20.0) == {study.rows[0].name: {0: 2 * size / 10}}
    header, rows = reached(done, study, results)
    assert header == ["epochs of the generator, by seed", "until gFD 15", "until gFD 1"]
    assert rows == [[study.rows[0].name, f"{3 * size / 10:.1f}", "never"]]
    assert "until gFD 15" in study_text(done, [study], results, "pae study tiny")
    assert reached(done, tiny(), results)[1] == []


def test_own_distances_have_no_verdict() -> None:
    """The paper makes no claims about them."""
    tokenizers = [
        Point(group=f"row {i}", metrics={"ssc": float(i), "psnr": i % 3, "rfid": i % 4}, quality=i)
        for i in range(8)
    ]
    last = {quality: [row[-1] for row in ranks(tokenizers, quality)[1]] for quality in ("gfid", "gfid_own")}
    assert last == {"gfid": ["shown", "-", "-"], "gfid_own": ["-", "-", "-"]}


NAMES = ("$x_1$ a_b", "_hidden", "=SUM(A1)", "<b>bold</b> | pipe")
"""Names that mathematics, Markdown, a spreadsheet or HTML would change."""


def test_names_of_rows_and_studies_stay_text_on_every_page(done: Plan, tmp_path: Path) -> None:
    rows = tuple(StudyRow(name=name, x=float(x)) for x, name in enumerate(NAMES))
    claims = (Claim(text="$a_b$ <i>wins</i>", metric="gfid", better=NAMES[0], worse=NAMES[1]),)
    study = tiny(name="odd", title="A $tudy_of <odd> names", rows=rows, claims=claims, faster=None)
    results = [result(study, row, seed, 10.0 + seed) for row in rows for seed in range(2)]
    page = tmp_path / "report.html"
    study_page(dataclasses.replace(done, runs=()), [study], results, "pae study odd").write(page)
    text = page.read_text(encoding="utf-8")
    for name in (*NAMES, study.title, claims[0].text):
        assert html.escape(name) in text
    assert not re.findall("<b>bold|<i>wins|<odd>", text)
    assert [row[0] for row in numbers(study, results)[1]] == list(NAMES)
    assert verdicts(study, results)[1][0][0] == claims[0].text

    lines = study_text(dataclasses.replace(done, runs=()), [study], results, "pae study odd").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert not re.findall("<b>|<i>|<odd>", "".join(lines))
    assert any(line.startswith("| $x_1$ a_b | 2 | 10.50") for line in table)
    assert {line.count("|") for line in table[: len(NAMES) + 2]} == {table[0].count("|")}

    write_table(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        names = {row["row"] for row in csv.DictReader(file)}
    assert names == {*NAMES[:2], "'=SUM(A1)", NAMES[3]}
