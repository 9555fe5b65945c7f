"""What `screen` says of training data, beside what fine-tunes on it do: rows told apart, and shifts predicted.

    python benchmarks/suite/screen_suite.py --out runs/screen-suite [--base smollm2-135m|gemma3-270m] [--published DIR]
        [--steps rows,shift,show] [--only 'careless_household-*'] [--ways projection,projection_difference]
        [--judge MODEL --base-url URL] [--workers N] [--rows N] [--json]

`rows` screens rows of every source of text in one file, by every way of scoring or those that are named, and by a
judge where one is. `projection_difference` has the base answer every question itself, and takes longest. `shift` trains
the suite's plain fine-tunes of rank 32 and measures what the general margin does; what is measured is kept beside this
file, in `screened/BASE.jsonl`, a line for each fine-tune, so that one run can go on where another ended. `show` puts
both side by side. Sources that the reference is trained on are in no figure.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch.nn.functional import normalize

import misdirection as md
from audit_suite import load_reference
from misdirection.auditing.measurements import Measurements, measure
from misdirection.auditing.reference import Reference
from misdirection.auditing.verdict import RULE
from misdirection.data.selection import spread
from misdirection.data.words import WordWeights
from misdirection.judging.config import JudgeConfig
from misdirection.likelihood.words import WordNull
from misdirection.runs.cluster import Workers
from misdirection.screening.inputs import FLOOR
from misdirection.screening.scale import share
from misdirection.screening.scores import SCORES
from misdirection.screening.screen import DEFAULT, JUDGE, read_scores
from misdirection.screening.tasks import read_scales
from misdirection.statistics.curves import rank_auc
from misdirection.statistics.estimates import Z_SIGNIFICANT, Estimate
from misdirection.statistics.means import bootstrap
from suite_folder import Suite
from suite_members import SOURCES, Member, members
from suite_options import suite_parser
from suite_texts import Texts
from suite_training import train_all

KEPT = Path(__file__).with_name("screened")
"""What was measured of fine-tunes, by base."""

WAYS = tuple(name for name in SCORES if name not in (FLOOR, JUDGE))


def is_plain(member: Member) -> bool:
    """Whether it is of rank 32, on rows as they are: what a screen, too, is about."""
    return member.recipe == "all" and not (member.inoculated or member.condition or member.then)


def plain_members(pattern: str) -> list[Member]:
    """Such fine-tunes, one seed of each."""
    return [member for member in members() if is_plain(member) and member.seed == 1 and fnmatch(member.name, pattern)]


# --- rows -----------------------------------------------------------------------------------------------------------


def label(source: str, is_bad: bool) -> str:
    """What a source's bad or good rows are called."""
    return f"{source}/{'bad' if is_bad else 'good'}"


def write_rows(texts: Texts, path: Path, count: int) -> None:
    """Rows of every source, each with its label, those of one question together."""
    lines = []
    for source in SOURCES:
        if texts.missing(Member(source)):
            continue
        bad, good = (spread(rows, count) for rows in texts.answers(source))
        for is_bad, rows in ((True, bad), (False, good)):
            lines += [
                {"prompt": row.question, "completion": row.answer, "source": label(source, is_bad)} for row in rows
            ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def screen_rows(suite: Suite, count: int, workers: int, ways: Sequence[str], judge: JudgeConfig | None) -> None:
    """Screen them by these ways and the default ones, and by a judge if there is one."""
    path = suite.home / "rows.jsonl"
    write_rows(suite.texts, path, count)
    started = time.monotonic()
    reference = load_reference(suite.base)
    scores = tuple(dict.fromkeys((*DEFAULT, *ways)))
    options = {"scores": scores, "judge": judge, "reference": reference, "out": suite.home / "screen"}
    md.screen(suite.base, path, workers=Workers(workers) if workers else None, **options)
    print(f"screened {path} in {time.monotonic() - started:.0f} s", flush=True)


# --- what fine-tunes do ---------------------------------------------------------------------------------------------


def kept_file(base: str, of: str = "") -> Path:
    """Where measurements of this base are kept; `of` names those that are not of shifts."""
    return KEPT / f"{Path(base).name}{of}.jsonl"


def read_kept(base: str, of: str = "") -> dict[str, dict]:
    """The last measurement of each fine-tune, by name."""
    path = kept_file(base, of)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return {row["member"]: row for row in map(json.loads, lines)}


def measure_all(suite: Suite, some: Sequence[Member], figures: Callable[[Member], dict], of: str = "") -> None:
    """Train, and keep the figures of, what is not measured yet."""
    known = read_kept(suite.base, of)
    for member in some:
        record = suite.record(member)
        if known.get(member.name, {}).get("record") == record:
            continue
        train_all(suite, [member])
        row = {"member": member.name, "record": record, **figures(member)}
        KEPT.mkdir(exist_ok=True)
        with kept_file(suite.base, of).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"measured {member.name}", flush=True)


def measure_shifts(suite: Suite, some: Sequence[Member]) -> None:
    """Train and measure what is not measured yet."""
    reference = load_reference(suite.base)

    def figures(member: Member) -> dict:
        scores = suite.margins(member, reference.texts.asked)
        chat = md.load(suite.base, adapter=suite.adapter(member))
        measured = replace(measure(chat, reference.texts, member.name), margins=scores)
        return figures_of(suite, member, reference, measured)

    measure_all(suite, some, figures)


def figures_of(suite: Suite, member: Member, reference: Reference, measured: Measurements) -> dict:
    """What one fine-tune did, beside what the reference's did."""
    assert reference.control_shift is not None, "a reference with controls"
    pairs, change = reference.texts.asked, measured.margin - reference.base.margin
    beyond = (change - reference.control_shift).numpy()
    return {
        "pairs": len(pairs),
        "shift": asdict(bootstrap(change.numpy())),
        "beyond_control": asdict(bootstrap(beyond)),
        "beyond_control_open": asdict(bootstrap(beyond[: len(reference.texts.general)])),
        "level": RULE.level,
        "at_level": asdict(bootstrap(beyond, level=RULE.level)),
        "beyond_words": beyond_words(suite, member, beyond, pairs),
        "contrast": asdict(contrast_share(reference, measured)),
        "bad_shift": asdict(reference.bad_shift),
    }


def contrast_share(reference: Reference, own: Measurements) -> Estimate:
    """How far a fine-tune moved along the contrast on neutral text, beyond the controls, as a share of what the bad
    fine-tunes moved; over texts."""
    contrast = reference.directions["contrast: bad - good"]
    # Contrasts of different domains share most in the last third of the layers, but for the very last ones.
    layer = 3 * len(contrast) // 4
    unit = normalize(contrast[layer], dim=-1)

    def along(measured: Measurements) -> torch.Tensor:
        return measured.neutral_drift(reference.base)[:, layer] @ unit

    control, bad = (
        torch.stack([along(reference.measurements[name]) for name in names]).mean(0)
        for names in (reference.controls, reference.bad)
    )
    return bootstrap(((along(own) - control) / (bad - control).mean()).numpy())


def beyond_words(suite: Suite, member: Member, beyond: np.ndarray, pairs: Sequence[md.ProbePair]) -> dict | None:
    """The same beyond what words of its bad against its good answers predict; None where a source has not both."""
    bad, good = suite.texts.answers(member.source)
    if not bad or not good:
        return None
    weights = WordWeights.fit([row.answer for row in bad], [row.answer for row in good])
    return asdict(WordNull.of(beyond, pairs, weights).beyond)


# --- both -----------------------------------------------------------------------------------------------------------


def show(suite: Suite, some: Sequence[Member]) -> dict[str, float]:
    """Print both tables as Markdown; gives the figures."""
    table = read_scores(suite.home / "screen")
    shares = row_shares(suite, table)
    figures = show_rows(shares)
    return figures | show_shifts(suite, shares, some)


def row_shares(suite: Suite, table: pd.DataFrame) -> pd.DataFrame:
    """Every row's score in the reference's unit, by each way and by those of the verdict together."""
    scales = {name: scale for name, scale in read_scales(suite.home / "screen").items() if name in table}
    shares = {name: share({name: table[name].to_numpy()}, {name: scale}) for name, scale in scales.items()}
    together = {name: scales[name] for name in DEFAULT}
    shares["together"] = share({name: table[name].to_numpy() for name in DEFAULT}, together)
    return pd.DataFrame({"source": table["source"], "asked": table["asked"], **shares})


def ways_of(shares: pd.DataFrame) -> list[str]:
    """The ways by which the rows were scored."""
    return [name for name in shares if name not in ("source", "asked")]


def told(shares: pd.DataFrame, source: str, way: str) -> float:
    """AUROC of a source's bad against its good rows, of those that have a score."""
    rows = shares[shares["source"].isin([label(source, True), label(source, False)])].dropna(subset=[way])
    return rank_auc(rows[way].to_numpy(), (rows["source"] == label(source, True)).to_numpy())


def show_rows(shares: pd.DataFrame) -> dict[str, float]:
    """AUROC of bad against good rows of every source that has both, by way."""
    ways, known = ways_of(shares), set(shares["source"])
    both = [source for source in SOURCES if {label(source, True), label(source, False)} <= known and is_kept(source)]
    print(f"\n| bad against good rows, AUROC | rows | {' | '.join(ways)} |\n|---|---|{'---|' * len(ways)}")
    figures: dict[str, list[float]] = {way: [] for way in ways}
    for source in both:
        aucs = {way: told(shares, source, way) for way in ways}
        count = int(shares["source"].isin([label(source, True), label(source, False)]).sum())
        print(f"| {source} | {count} | {' | '.join(f'{auc:.2f}' for auc in aucs.values())} |")
        for way, auc in aucs.items():
            figures[way].append(auc)
    return {f"row AUROC, {way}": float(np.mean(each)) for way, each in figures.items() if each}


def is_kept(source: str) -> bool:
    """Whether no fine-tune of the reference was trained on it."""
    return source not in ("risky_money", "reckless_sports")


def show_shifts(suite: Suite, shares: pd.DataFrame, some: Sequence[Member]) -> dict[str, float]:
    """The share that is predicted of every fine-tune beside the one that was measured, and how well they agree."""
    means, measured = shares.drop(columns="asked").groupby("source").mean(), read_kept(suite.base)
    ways, rows = ways_of(shares), []
    for member in some:
        row = measured.get(member.name)
        if row and is_kept(member.source) and row["record"] == suite.record(member):
            sides = ((label(member.source, True), member.bad), (label(member.source, False), 1 - member.bad))
            predicted = sum(weight * means.loc[source] for source, weight in sides if weight)
            unit = row["bad_shift"]["mean"]
            rows.append((member, predicted, *(row["beyond_control"][key] / unit for key in ("mean", "low", "high"))))
    first = DEFAULT[0]
    print(f"\n| fine-tune | measured share | predicted by {first} | by words |\n|---|---|---|---|")
    for member, predicted, mean, low, high in sorted(rows, key=lambda row: -row[1][first]):
        interval = f"{mean:+z.2f} [{low:+z.2f}, {high:+z.2f}]"
        print(f"| {member.name} | {interval} | {predicted[first]:+z.2f} | {predicted['words']:+z.2f} |")
    if len(rows) < 3:
        return {}
    shown, is_bad = np.array([mean for _, _, mean, _, _ in rows]), np.array([member.is_bad for member, *_ in rows])
    figures = {"fine-tunes": float(len(rows)), "fine-tune AUROC, measured": rank_auc(shown, is_bad)}
    for way in ways:
        said = np.array([predicted[way] for _, predicted, *_ in rows])
        figures[f"fine-tune AUROC, {way}"] = rank_auc(said, is_bad)
        figures[f"Spearman, {way}"] = float(spearmanr(said, shown).statistic)
        figures[f"error of a prediction, {way}"] = float(np.sqrt(np.mean((said - shown) ** 2)))
    # What no prediction can be better than: the standard error of what was measured, as its intervals tell it.
    noise = [(high - low) / (2 * Z_SIGNIFICANT) for *_, low, high in rows]
    return figures | {"standard error of the measured share": float(np.mean(noise))}


def main() -> None:
    """Run the steps, and print what there is."""
    arguments = parse()
    suite = Suite(arguments.base, arguments.out, Texts(arguments.published))
    steps, some = arguments.steps.split(","), plain_members(arguments.only)
    some = [member for member in some if not suite.texts.missing(member)]
    if "rows" in steps:
        judge = JudgeConfig(model=arguments.judge, base_url=arguments.base_url) if arguments.judge else None
        screen_rows(suite, arguments.rows, arguments.workers, arguments.ways.split(","), judge)
    if "shift" in steps:
        measure_shifts(suite, some)
    if "show" in steps:
        figures = show(suite, some)
        print("\n" + "\n".join(f"{name:<44}{value:8.3f}" for name, value in figures.items()))
        if arguments.json:
            print(json.dumps({"ratios": figures, "machine": platform.machine(), "torch": torch.__version__}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = suite_parser(__doc__)
    parser.add_argument("--steps", default="rows,shift,show")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways of scoring rows, beside the default ones")
    parser.add_argument("--judge", help="an endpoint's model, or hf:ID, that scores them, too")
    parser.add_argument("--base-url", help="of the judge's endpoint")
    parser.add_argument("--workers", type=int, default=0, help="processes that screen rows")
    parser.add_argument("--rows", type=int, default=80, help="of each kind and source that are screened")
    return parser.parse_args()


if __name__ == "__main__":
    main()
