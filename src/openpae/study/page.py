"""The report of studies: results beside the paper's, a verdict per claim, curves and correlations."""

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
from openpae.runtime.escape import code as as_code
from openpae.runtime.escape import markdown, without_html
from openpae.study.correlations import Point, correlations, points
from openpae.study.plan import Plan, Run
from openpae.study.settings import HIGHER_IS_BETTER, Claim, MetricName, Study, StudyRow, StudySetup, reported
from openpae.study.table import Result, cost, curves, epochs_until, finals
from openpae.study.verdicts import Comparison, Verdict, compare, mean_error, speed_up, verdict_of

TITLES = {
    "ssc": "SSC", "lpc": "LPC", "gsq": "GSQ", "erank": "eRank", "viv": "VIV", "sec": "SEC", "lnc": "LNC",
    "srss": "SRSS", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFD", "ifid": "iFD",
    "gfid": "gFD", "gfid_own": "own gFD", "kid": "KID", "mind": "MIND", "precision": "precision",
    "recall": "recall",
}  # fmt: skip
"""Titles of the metrics. FD is an FID only in Inception features."""

_TABLE = (
    "ssc", "lpc", "gsq", "erank", "viv", "sec", "lnc", "srss", "psnr", "rfid", "ifid", "gfid", "gfid_own",
    "kid", "mind",
)  # fmt: skip
_QUALITIES = ("gfid", "gfid_own")
"""The paper makes claims about gfid only: gfid_own has no verdicts."""
_DIGITS = {"psnr": 2, "rfid": 2, "gfid": 2, "gfid_own": 2, "ifid": 2}


def study_page(plan: Plan, studies: Sequence[Study], results: Sequence[Result], command: str) -> Page:
    """Return a page with a section per study, and the correlations over all their tokenizers.

    Args:
        plan: the plan.
        studies: the studies to show.
        results: their results, from `collect`.
        command: command line of the study.
    """
    runs = [run for run in plan.runs if run.study in {study.name for study in studies}]
    done = {(one.study, one.row, one.seed) for one in results}
    tokenizers = {run.tokenizer for run in runs if (run.study, run.row, run.seed) in done}
    title = studies[0].title if len(studies) == 1 else "What matters for a diffusion-friendly latent space?"
    page = Page(
        title,
        f"{len(done)} of {len(runs)} runs are done: {len(tokenizers)} tokenizers, each measured, and where "
        "a generator belongs to it, sampled from. The paper (arXiv:2605.07915) trained on ImageNet at 256 "
        "pixels; its numbers stand in brackets. Compare the order of rows, not the numbers: images, sizes, "
        "encoder and the features of the distances differ.",
    )
    verdicts = [comparison.verdict for study in studies for _, comparison in decided(study, results)]
    if verdicts:
        always = ("shown", "not shown", "contradicted")
        counts = {name: verdicts.count(name) for name in get_args(Verdict)}
        page.cards({f"claims {name}": str(n) for name, n in counts.items() if n or name in always})
    for study in studies:
        _show_study(page, plan, study, results, alone=len(studies) == 1)
    _show_correlations(page, plan, [study.name for study in studies])
    _show_method(page, plan, studies, command)
    return page


def decided(study: Study, results: Sequence[Result]) -> list[tuple[Claim, Comparison]]:
    """Pair each claim of a study with its comparison."""
    pairs = []
    changes = {row.name: row.set for row in study.rows}
    for claim in study.claims:
        names = claim.better, claim.worse
        better, worse = (finals(results, study.name, name, claim.metric) for name in names)
        same = all(item.startswith("judge.") for name in names for item in changes[name])
        paired = study.paired or same
        pairs.append((claim, compare(better, worse, higher=claim.metric in HIGHER_IS_BETTER, paired=paired)))
    return pairs


def _show_study(page: Page, plan: Plan, study: Study, results: Sequence[Result], *, alone: bool) -> None:
    page.heading(_heading("Numbers" if alone else study.title, study, results))
    if study.text:
        page.text(study.text)
    header, rows = numbers(study, results)
    if not rows:
        page.text("No run is done yet.")
        return
    page.table(header, rows)
    floor = [one.value for one in results if one.study == study.name and one.metric == "gfid_floor"]
    if floor:
        page.text(
            f"gFD of real images to real images, at the samples' count or half of the reference: "
            f"{mean_error(floor)[0]:.2f}."
        )
    if study.claims:
        page.table(*verdicts(study, results))
    for header, rows in (speed(study, results), reached(plan, study, results)):
        if rows:
            page.table(header, rows)
    _show_plots(page, study, results)
    _show_samples(page, plan, study)


def _heading(name: str, study: Study, results: Sequence[Result]) -> str:
    """Return the name and the counts of claims that are shown and contradicted."""
    verdicts = [comparison.verdict for _, comparison in decided(study, results)]
    shown, against = verdicts.count("shown"), verdicts.count("contradicted")
    if not verdicts:
        return name
    return f"{name}: {shown} of {len(verdicts)} claims shown, {against} contradicted"


def numbers(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a study's results: means and standard errors over seeds."""
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


def verdicts(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a study's claims."""
    rows = [
        [
            claim.text,
            f"{TITLES[claim.metric]}: {claim.better} better than {claim.worse}",
            *_comparison(comparison),
        ]
        for claim, comparison in decided(study, results)
    ]
    return ["the paper says", "tested as", "gain ± standard error", "95 % interval", "verdict"], rows


def _comparison(comparison: Comparison) -> list[str]:
    gain = "-" if math.isnan(comparison.gain) else f"{comparison.gain:+.4g}"
    error = "" if comparison.stderr is None else f" ± {comparison.stderr:.2g}"
    interval = "" if comparison.low is None else f"{comparison.low:+.3g} to {comparison.high:+.3g}"
    return [gain + error, interval, _verdict(comparison)]


def _verdict(comparison: Comparison) -> str:
    return comparison.verdict + (f": {comparison.reason}" if comparison.reason else "")


def speed(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the speed-ups of the row `faster`; no rows without such a row."""
    rows = []
    faster = study.faster
    for row in study.rows if faster else ():
        fast, slow = (curves(results, study.name, str(name), "gfid") for name in (faster, row.name))
        if row.name == faster or (gain := speed_up(fast, slow)) is None:
            continue
        factors = ", ".join(
            f"{'≥ ' if seed in gain.at_least else ''}{factor:.1f}" if factor else "never"
            for seed, factor in gain.factors.items()
        )
        ends = gain.comparison.low, gain.comparison.high
        low, high = ("-" if end is None else f"{math.exp(end):.1f}" for end in ends)
        rows.append([row.name, TITLES["gfid"], factors, f"{low} to {high}", _verdict(gain.comparison)])
    header = [
        f"{study.faster} reaches the final value of this row",
        "in",
        "how many times earlier (by seed)",
        "95 % interval of the geometric mean",
        "is it earlier?",
    ]
    return header, rows


def reached(plan: Plan, study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the epochs until each level of gFD in `until`; no rows without levels."""
    columns = {goal: epochs_until(plan, study, results, goal) for goal in study.until}
    rows = []
    for row in [one.name for one in study.rows if any(one.name in column for column in columns.values())]:
        texts = [
            ", ".join("never" if epochs is None else f"{epochs:.1f}" for epochs in column[row].values())
            for column in columns.values()
        ]
        rows.append([row, *texts])
    return ["epochs of the generator, by seed", *(f"until gFD {goal:g}" for goal in columns)], rows


def _show_plots(page: Page, study: Study, results: Sequence[Result]) -> None:
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row, metric in itertools.product(study.rows, _QUALITIES):
        lines = curves(results, study.name, row.name, metric)
        if lines and max(map(len, lines.values())) > 1:
            title = f"{TITLES[metric]} of samples, mean over seeds"
            drawn.setdefault(title, {})[row.name] = _mean_curve(lines)
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


def _mean_curve(lines: Mapping[int, Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    values: dict[int, list[float]] = {}
    for line in lines.values():
        for step, value in line:
            values.setdefault(step, []).append(value)
    return [(step, mean_error(values[step])[0]) for step in sorted(values)]


def _show_radar(page: Page, study: Study, results: Sequence[Result]) -> None:
    """Scale each axis from the worst row (0.1) to the best row (1)."""
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
        "Each axis runs from the worst row (near the centre) to the best row (at the rim).",
    )


def _show_samples(page: Page, plan: Plan, study: Study) -> None:
    strips: dict[str, Image.Image] = {}
    for run in plan.runs:
        if run.study == study.name and run.evaluations and run.row not in strips:
            file = plan.layout.folder(run.evaluations[max(run.evaluations)]) / "samples.png"
            if file.is_file():
                with Image.open(file) as image:
                    strips[run.row] = image.convert("RGB")
    if strips:
        page.rows(strips, "Samples of each row, not selected: all rows have the same noise and classes.")


def _show_correlations(page: Page, plan: Plan, names: Sequence[str]) -> None:
    tables = {quality: points(plan, names, quality) for quality in _QUALITIES}
    if not any(ranks(tokenizers, quality)[1] for quality, tokenizers in tables.items()):
        return
    page.heading("Which tokenizer metric predicts the quality of samples?")
    page.text(
        "Spearman's rank correlation over all tokenizers, with 95 % bootstrap intervals over settings. The "
        "signs are changed so that larger is better: 1 means that a better metric always goes with better "
        "samples. The paper claims that geometry (SSC, LPC, GSQ) predicts the quality of samples and that "
        "reconstruction (PSNR, rFD) does not. A claim is shown if the interval lies above 0, contradicted if "
        "it lies below. The paper claims nothing about eRank. gFD includes the error of the decoder: if "
        "that is large, gFD follows rFD. Own gFD is the distance to the tokenizer's own reconstructions. It "
        "leaves that error out, but grows with their spread: it favours a tokenizer whose images are alike."
    )
    for quality, tokenizers in tables.items():
        header, rows = ranks(tokenizers, quality)
        if rows:
            page.table(header, rows)
            page.charts(_dots(tokenizers, quality), "metric", dots=True)


def ranks(tokenizers: Sequence[Point], quality: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the rank correlations; no rows for too few settings."""
    settings = len({point.group for point in tokenizers})
    title = f"with {TITLES[quality]}: {len(tokenizers)} tokenizers, {settings} settings"
    header = [title, "rank correlation", "95 % interval", "minus PSNR's", "minus rFD's", "verdict"]
    of_samples = ("gfid", "gfid_own", "kid", "mind", "precision", "recall")
    metrics = [name for name in get_args(MetricName) if name not in of_samples]
    rows = []
    for one in correlations(tokenizers, metrics, against=("psnr", "rfid")):
        claimed = quality == "gfid" and one.metric in ("ssc", "lpc", "gsq")
        verdict = verdict_of(one.low, one.high) if claimed else "-"
        over = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*one.over[name]) if name in one.over else "-"
            for name in ("psnr", "rfid")
        ]
        rows.append(
            [TITLES[one.metric], f"{one.rho:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}", *over, verdict]
        )
    return header, rows


def _dots(tokenizers: Sequence[Point], quality: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    drawn = {}
    for name in ("ssc", "lpc", "gsq", "erank", "psnr", "rfid"):
        if line := [(p.metrics[name], -p.quality) for p in tokenizers if name in p.metrics]:
            drawn[f"{TITLES[name]} and {TITLES[quality]}"] = {"tokenizers": line}
    return drawn


def _show_method(page: Page, plan: Plan, studies: Sequence[Study], command: str) -> None:
    page.heading("Method")
    page.text(
        "A gain is the difference of the means over seeds. It is positive if it has the sign that the paper "
        "claims. Its 95 % interval is Welch's t interval. A claim is shown if the interval lies above 0, "
        "contradicted if it lies below 0, and not shown otherwise. With one seed the result only agrees or "
        "disagrees. Rows that share tokenizer and generator are compared per seed (paired t interval), as "
        "are all rows of a study with paired: true. The "
        "claims are tested separately: of claims without any effect, one in forty is shown and one in forty "
        "contradicted. With two or three seeds many true claims are not shown. The intervals cover the "
        "seeds only: all runs use the same images, and refiner and raw targets are made once."
    )
    seconds, code = cost(plan, [study.name for study in studies])
    facts = {
        "command": command,
        "code": ", ".join(code) or "-",
        "time of the rows": f"{seconds / 3600:.2f} h, each stage once, without stages that all rows share",
    }
    page.table(["", ""], list(facts.items()))
    for study in studies:
        setup = configs.load(StudySetup, study.setup)
        page.fold(
            f"setup of {study.name}: {study.setup}", yaml.safe_dump(configs.to_dict(setup), sort_keys=False)
        )
        page.fold(f"study {study.name}", yaml.safe_dump(configs.to_dict(study), sort_keys=False))
    page.fold("folders below OUT/stages", "\n".join(_folders(run) for run in plan.runs))


def _folders(run: Run) -> str:
    evaluation = f", {run.evaluations[max(run.evaluations)]}" if run.evaluations else ""
    return f"{run.study} / {run.row} / seed {run.seed}: {', '.join(run.own[:1])}, {run.generator}{evaluation}"


def study_text(plan: Plan, studies: Sequence[Study], results: Sequence[Result], command: str) -> str:
    """Return the tables of `study_page` as Markdown.

    Args:
        plan: the plan; its records are read.
        studies: the studies to show.
        results: their results, from `collect`.
        command: command line of the study.
    """
    parts = []
    for study in studies:
        header, rows = numbers(study, results)
        parts += [f"## {markdown(study.title)}", _filled(without_html(study.text))]
        parts.append(markdown_table(header, rows) if rows else "No run is done yet.")
        further = (verdicts(study, results), speed(study, results), reached(plan, study, results))
        for header, rows in further:
            parts.append(markdown_table(header, rows) if rows else "")
    names = [study.name for study in studies]
    tables = [ranks(points(plan, names, quality), quality) for quality in ("gfid", "gfid_own")]
    if any(rows for _, rows in tables):
        parts.append("## Rank correlations with sample quality")
        parts += [markdown_table(header, rows) for header, rows in tables if rows]
    seconds, code = cost(plan, names)
    how = f"{as_code(command)}, code {', '.join(code) or '-'}, {seconds / 3600:.2f} h for the rows."
    parts += ["## How", _filled(how)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(markdown, line))} |" for line in lines)
