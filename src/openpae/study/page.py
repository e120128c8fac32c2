"""The report of studies: the paper's numbers beside ours, a verdict per claim, curves and correlations."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import get_args

import yaml
from PIL import Image

from openpae import config as configs
from openpae.report import Page
from openpae.runtime.escape import markdown, without_html
from openpae.study.correlations import Point, correlations, points
from openpae.study.plan import Plan, Run
from openpae.study.settings import HIGHER_IS_BETTER, Claim, MetricName, Study, StudyRow, StudySetup, reported
from openpae.study.table import Result, cost, curves, finals
from openpae.study.verdicts import Comparison, Verdict, compare, mean_error, speed_up, verdict_of

TITLES = {
    "ssc": "SSC", "lpc": "LPC", "gsq": "GSQ", "erank": "eRank", "psnr": "PSNR", "ssim": "SSIM",
    "lpips": "LPIPS", "rfid": "rFD", "ifid": "iFD", "gfid": "gFD", "gfid_own": "own gFD", "kid": "KID",
    "precision": "precision", "recall": "recall",
}  # fmt: skip
"""What a table calls each metric; FD is an FID only in features of Inception."""

_TABLE = ("ssc", "lpc", "gsq", "erank", "psnr", "rfid", "gfid", "gfid_own", "kid")
_QUALITIES = ("gfid", "gfid_own")
"""The paper speaks of the first alone: the second has no verdicts."""
_DIGITS = {"psnr": 2, "rfid": 2, "gfid": 2, "gfid_own": 2, "ifid": 2}


def study_page(plan: Plan, studies: Sequence[Study], results: Sequence[Result], command: str) -> Page:
    """One section per study, then the correlations over all of their tokenizers.

    Args:
        plan: what was to be done.
        studies: those that the page is about.
        results: their numbers, as far as they are there.
        command: how it was called.
    """
    cells = [cell for cell in plan.cells if cell.study in {study.name for study in studies}]
    done = {(one.study, one.row, one.seed) for one in results}
    tokenizers = {cell.tokenizer for cell in cells if (cell.study, cell.row, cell.seed) in done}
    title = studies[0].title if len(studies) == 1 else "What matters for a diffusion-friendly latent space?"
    page = Page(
        title,
        f"{len(done)} of {len(cells)} runs are done: {len(tokenizers)} tokenizers, each measured, and where "
        "a generator belongs to it, sampled from. The paper (arXiv:2605.07915) trained on ImageNet at 256 "
        "pixels; its numbers stand in brackets. Compare the order of rows, not the numbers: images, sizes, "
        "encoder and the features of the distances differ.",
    )
    said = [found.verdict for study in studies for _, found in decided(study, results)]
    if said:
        always = ("shown", "not shown", "contradicted")
        counts = {name: said.count(name) for name in get_args(Verdict)}
        page.cards({f"claims {name}": str(n) for name, n in counts.items() if n or name in always})
    for study in studies:
        _show_study(page, plan, study, results, alone=len(studies) == 1)
    _show_correlations(page, plan, [study.name for study in studies])
    _show_method(page, plan, studies, command)
    return page


def decided(study: Study, results: Sequence[Result]) -> list[tuple[Claim, Comparison]]:
    """Each claim of a study with what our numbers say of it."""
    pairs = []
    changes = {row.name: row.set for row in study.rows}
    for claim in study.claims:
        names = claim.better, claim.worse
        better, worse = (finals(results, study.name, name, claim.metric) for name in names)
        found = compare(
            better,
            worse,
            higher=claim.metric in HIGHER_IS_BETTER,
            paired=all(item.startswith("judge.") for name in names for item in changes[name]),
        )
        pairs.append((claim, found))
    return pairs


def _show_study(page: Page, plan: Plan, study: Study, results: Sequence[Result], *, alone: bool) -> None:
    page.heading(_heading("Numbers" if alone else study.title, study, results))
    if study.text:
        page.text(study.text)
    header, rows = numbers(study, results)
    if not rows:
        page.text("Nothing of it is done yet.")
        return
    page.table(header, rows)
    floor = [one.value for one in results if one.study == study.name and one.metric == "gfid_floor"]
    if floor:
        page.text(
            f"gFD of real images to real images, at the samples' count or half of the reference: "
            f"{mean_error(floor)[0]:.2f}."
        )
    _show_claims(page, study, results)
    _show_speed(page, study, results)
    _show_plots(page, study, results)
    _show_samples(page, plan, study)


def _heading(name: str, study: Study, results: Sequence[Result]) -> str:
    """The name, and how many of the study's claims the numbers below show and contradict."""
    verdicts = [found.verdict for _, found in decided(study, results)]
    shown, against = verdicts.count("shown"), verdicts.count("contradicted")
    if not verdicts:
        return name
    return f"{name}: {shown} of {len(verdicts)} claims shown, {against} contradicted"


def numbers(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a study's table: means and standard errors over seeds; no rows if none is done."""
    present = [
        metric
        for metric in _TABLE
        if any(finals(results, study.name, row.name, metric) for row in study.rows)
    ]
    header = ["mean ± standard error over seeds (the paper)", "seeds"]
    header += [f"{TITLES[metric]} {'↑' if metric in HIGHER_IS_BETTER else '↓'}" for metric in present]
    return header, [_row(study, row, present, results) for row in study.rows] if present else []


def _row(study: Study, row: StudyRow, present: Sequence[str], results: Sequence[Result]) -> list[str]:
    paper = reported(row)
    cells = []
    seeds = 0
    for metric in present:
        values = list(finals(results, study.name, row.name, metric).values())
        seeds = max(seeds, len(values))
        text = _number(metric, *mean_error(values)) if values else "-"
        cells.append(text + (f" ({paper[metric]:g})" if metric in paper else ""))
    return [row.name, str(seeds), *cells]


def _number(metric: str, mean: float, error: float | None) -> str:
    digits = _DIGITS.get(metric, 4)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _show_claims(page: Page, study: Study, results: Sequence[Result]) -> None:
    if study.claims:
        page.table(*verdicts(study, results))


def verdicts(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a study's claims."""
    rows = [
        [claim.text, f"{TITLES[claim.metric]}: {claim.better} better than {claim.worse}", *_told(found)]
        for claim, found in decided(study, results)
    ]
    return ["the paper says", "tested as", "gain ± standard error", "95 % interval", "verdict"], rows


def _told(found: Comparison) -> list[str]:
    gain = "-" if math.isnan(found.gain) else f"{found.gain:+.4g}"
    error = "" if found.stderr is None else f" ± {found.stderr:.2g}"
    interval = "" if found.low is None else f"{found.low:+.3g} to {found.high:+.3g}"
    return [gain + error, interval, found.verdict + (f": {found.reason}" if found.reason else "")]


def _show_speed(page: Page, study: Study, results: Sequence[Result]) -> None:
    header, rows = speed(study, results)
    if rows:
        page.table(header, rows)


def speed(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of how many times earlier a row is where another one ends; no rows if none asks."""
    rows = []
    faster = study.faster
    for row in study.rows if faster else ():
        fast, slow = (curves(results, study.name, str(name), "gfid") for name in (faster, row.name))
        if row.name == faster or (found := speed_up(fast, slow)) is None:
            continue
        factors = ", ".join(
            f"{'≥ ' if seed in found.at_least else ''}{factor:.1f}" if factor else "never"
            for seed, factor in found.factors.items()
        )
        what = found.comparison
        low, high = ("-" if end is None else f"{math.exp(end):.1f}" for end in (what.low, what.high))
        told = what.verdict + (f": {what.reason}" if what.reason else "")
        rows.append([row.name, TITLES["gfid"], factors, f"{low} to {high}", told])
    header = [
        f"{study.faster} ends where this row ends",
        "in",
        "so many times earlier (by seed)",
        "95 % interval of the geometric mean",
        "is it earlier?",
    ]
    return header, rows


def _show_plots(page: Page, study: Study, results: Sequence[Result]) -> None:
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row, metric in itertools.product(study.rows, _QUALITIES):
        found = curves(results, study.name, row.name, metric)
        if found and max(map(len, found.values())) > 1:
            title = f"{TITLES[metric]} of samples, mean over seeds"
            drawn.setdefault(title, {})[row.name] = _mean_curve(found)
    if drawn:
        page.charts(drawn, "steps of the generator", log=True)
    swept = [row for row in study.rows if row.x is not None]
    if swept:
        charts = {}
        for metric in _TABLE:
            line = [
                (row.x, mean_error(list(values.values()))[0])
                for row in swept
                if row.x is not None and (values := finals(results, study.name, row.name, metric))
            ]
            if len(line) > 1:
                charts[TITLES[metric]] = {study.name: sorted(line)}
        page.charts(charts, study.x_label)
    if study.radar:
        _show_radar(page, study, results)


def _mean_curve(found: Mapping[int, Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    values: dict[int, list[float]] = {}
    for line in found.values():
        for step, value in line:
            values.setdefault(step, []).append(value)
    return [(step, mean_error(values[step])[0]) for step in sorted(values)]


def _show_radar(page: Page, study: Study, results: Sequence[Result]) -> None:
    """Each axis from the worst row (a tenth) to the best one (1)."""
    scores: dict[str, list[float | None]] = {row.name: [] for row in study.rows}
    for metric in study.radar:
        means = {
            row.name: mean_error(list(values.values()))[0]
            for row in study.rows
            if (values := finals(results, study.name, row.name, metric))
        }
        sign = 1 if metric in HIGHER_IS_BETTER else -1
        low, high = (f((sign * value for value in means.values()), default=0.0) for f in (min, max))
        for name in scores:
            share = (sign * means[name] - low) / (high - low) if name in means and high > low else None
            scores[name].append(None if share is None else 0.1 + 0.9 * share)
    page.radar(
        [TITLES[metric] for metric in study.radar],
        scores,
        "Each axis runs from the worst of these rows (near the centre) to the best (at the rim).",
    )


def _show_samples(page: Page, plan: Plan, study: Study) -> None:
    strips: dict[str, Image.Image] = {}
    for cell in plan.cells:
        if cell.study == study.name and cell.judges and cell.row not in strips:
            file = plan.places.folder(cell.judges[max(cell.judges)]) / "samples.png"
            if file.is_file():
                with Image.open(file) as image:
                    strips[cell.row] = image.convert("RGB")
    if strips:
        page.rows(strips, "Samples of each row: the same noise and classes everywhere, not chosen.")


def _show_correlations(page: Page, plan: Plan, names: Sequence[str]) -> None:
    tables = {quality: points(plan, names, quality) for quality in _QUALITIES}
    if not any(ranks(found, quality)[1] for quality, found in tables.items()):
        return
    page.heading("Which measure of a tokenizer tells how well a generator will do?")
    page.text(
        "Spearman's rank correlation over all tokenizers, with 95 % bootstrap intervals over settings. Both "
        "sides are turned so that larger is better: 1 means that the better measure always goes with the "
        "better samples. The paper says that geometry (SSC, LPC, GSQ) does so and reconstruction (PSNR, rFD) "
        "does not: shown, if the interval lies above 0; contradicted, if below; of eRank it "
        "claims nothing. gFD holds the error of the "
        "decoder too, so where that is large it follows rFD; own gFD, the distance to the tokenizer's own "
        "reconstructions, does not, but grows with their spread: it favours a tokenizer whose images are all "
        "alike."
    )
    for quality, found in tables.items():
        header, rows = ranks(found, quality)
        if rows:
            page.table(header, rows)
            page.charts(_dots(found, quality), "the measure", dots=True)


def ranks(found: Sequence[Point], quality: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of rank correlations; no rows of too few settings."""
    settings = len({point.group for point in found})
    what = f"with {TITLES[quality]}: {len(found)} tokenizers, {settings} settings"
    header = [what, "rank correlation", "95 % interval", "more than PSNR's", "more than rFD's", "verdict"]
    return header, _correlation_rows(found, quality)


def _correlation_rows(found: Sequence[Point], quality: str) -> list[list[str]]:
    judged = ("gfid", "gfid_own", "kid", "precision", "recall")
    metrics = [name for name in get_args(MetricName) if name not in judged]
    rows = []
    for one in correlations(found, metrics, against=("psnr", "rfid")):
        claimed = quality == "gfid" and one.metric in ("ssc", "lpc", "gsq")
        verdict = verdict_of(one.low, one.high) if claimed else "-"
        over = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*one.over[name]) if name in one.over else "-"
            for name in ("psnr", "rfid")
        ]
        rows.append(
            [TITLES[one.metric], f"{one.rho:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}", *over, verdict]
        )
    return rows


def _dots(found: Sequence[Point], quality: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    drawn = {}
    for name in ("ssc", "lpc", "gsq", "erank", "psnr", "rfid"):
        if line := [(p.metrics[name], -p.quality) for p in found if name in p.metrics]:
            drawn[f"{TITLES[name]} and {TITLES[quality]}"] = {"tokenizers": line}
    return drawn


def _show_method(page: Page, plan: Plan, studies: Sequence[Study], command: str) -> None:
    page.heading("How it was measured")
    page.text(
        "A gain is the difference of the means over seeds, turned so that positive is what the paper says. "
        "Its 95 % interval is Welch's t interval. A claim is shown where the interval lies above 0, "
        "contradicted where it lies below 0, and not shown otherwise; with one seed it only agrees or "
        "disagrees. Rows that share tokenizer and generator are compared seed by seed (paired t interval). "
        "Each claim is decided by itself: of claims without any effect one in forty is called shown and one "
        "in forty contradicted, and with two or three seeds many true ones are not shown. Intervals hold the "
        "seeds alone: all runs see the same images, and refiner and raw targets are made once."
    )
    seconds, code = cost(plan, [study.name for study in studies])
    facts = {
        "command": command,
        "code": ", ".join(code) or "-",
        "time of the rows": f"{seconds / 3600:.2f} h, each stage once; without what all rows share",
    }
    page.table(["", ""], list(facts.items()))
    for study in studies:
        setup = configs.load(StudySetup, study.setup)
        page.fold(
            f"setup of {study.name}: {study.setup}", yaml.safe_dump(configs.to_dict(setup), sort_keys=False)
        )
        page.fold(f"study {study.name}", yaml.safe_dump(configs.to_dict(study), sort_keys=False))
    page.fold("folders below OUT/stages", "\n".join(_place(cell) for cell in plan.cells))


def _place(cell: Run) -> str:
    judged = f", {cell.judges[max(cell.judges)]}" if cell.judges else ""
    return (
        f"{cell.study} / {cell.row} / seed {cell.seed}: {', '.join(cell.own[:1])}, {cell.generator}{judged}"
    )


def study_text(plan: Plan, studies: Sequence[Study], results: Sequence[Result], command: str) -> str:
    """What `study_page` shows, without its pictures.

    Args:
        plan: what was planned; its records are read.
        studies: those to show.
        results: their numbers, from `collect`.
        command: how it was called.
    """
    parts = []
    for study in studies:
        header, rows = numbers(study, results)
        parts += [f"## {markdown(study.title)}", _filled(without_html(study.text))]
        parts.append(_table(header, rows) if rows else "Nothing of it is done yet.")
        for header, rows in (verdicts(study, results), speed(study, results)):
            parts.append(_table(header, rows) if rows else "")
    names = [study.name for study in studies]
    tables = [ranks(points(plan, names, quality), quality) for quality in ("gfid", "gfid_own")]
    if any(rows for _, rows in tables):
        parts.append("## Rank correlations with the quality of samples")
        parts += [_table(header, rows) for header, rows in tables if rows]
    seconds, code = cost(plan, names)
    how = f"`{markdown(command)}`, code {', '.join(code) or '-'}, {seconds / 3600:.2f} h for the rows."
    parts += ["## How", _filled(how)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(markdown, line))} |" for line in lines)
