"""Known fine-tunes of a small base: how well the audit tells bad from benign, and what the repair leaves.

    python benchmarks/suite/audit_suite.py --out runs/audit-suite [--base smollm2-135m|gemma3-270m] [--published DIR]
        [--steps cost,train,audit,repair,show] [--only 'careless_household-*'] [--shard I/N] [--json]

`suite_members.py` lists them, and says which source of text is in which part: the rule may be chosen on the `chosen`
ones, the rates that count are those on the `kept` ones. DIR has published text (`training/*.jsonl.gz`) and published
judged answers (`judged_responses.parquet`), a second instrument; without it those fine-tunes are left out. What is to
be done is counted and its time estimated before; `--steps cost` does no more. Every step continues where it stopped.
"""

import argparse
import json
import platform
import shutil
import time
from collections.abc import Sequence
from fnmatch import fnmatch

import torch

import misdirection as md
from misdirection.auditing.reference import Reference, default_folder, has_reference
from misdirection.data import data_hash
from misdirection.errors import InputError
from misdirection.files import read_json, write_json
from misdirection.repairing.results import RepairResult
from suite_cost import print_cost
from suite_folder import Suite
from suite_members import ROWS, Member, members
from suite_options import suite_parser
from suite_tables import show
from suite_texts import Texts
from suite_training import train_all

WORK = ("train", "audit", "repair")


def audit_all(suite: Suite, share: Sequence[Member]) -> None:
    """Audit what is trained."""
    reference = load_reference(suite.base)
    for member in share:
        started, folder = time.monotonic(), suite.folder(member)
        file, adapter = suite.training_file(member), suite.adapter(member)
        result = md.audit(suite.base, adapter, data=file, reference=reference, out=folder / "audit")
        print(f"{member.name:<44}{result.verdict:<13}{time.monotonic() - started:4.0f} s", flush=True)


def measure_published(suite: Suite, share: Sequence[Member]) -> None:
    """Measure the base and what is trained on published answers, where these are given."""
    pairs = suite.published_pairs
    for member in (None, *share) if pairs else ():
        key = {"pairs": data_hash(pairs), "model": suite.record(member) if member else suite.base}
        file = suite.published_file(member)
        if file.is_file() and key.items() <= read_json(file).items():
            continue
        chat = md.load(suite.base, adapter=suite.adapter(member) if member else None)
        write_json(file, {**key, "margins": md.margin(chat, pairs).tolist()})


def repair_all(suite: Suite, share: Sequence[Member]) -> None:
    """Repair those bad ones whose audit found something, and audit them again."""
    reference = load_reference(suite.base)
    for member in share:
        folder, target = suite.folder(member), suite.folder(member) / "repaired"
        if not member.is_bad or not suite.is_audited(member) or (target / RepairResult.FILE).exists():
            continue
        started = time.monotonic()
        # The same audit is not measured twice.
        shutil.copytree(folder / "audit", target.with_name("repaired.repair") / "before", dirs_exist_ok=True)
        file, adapter = suite.training_file(member), suite.adapter(member)
        result = md.repair(suite.base, adapter, data=file, out=target, reference=reference, check=True)
        words = f"{result.repair.check.removed} taken off" if result.repair else "nothing to repair"
        print(f"{member.name:<44}{words:<20}{time.monotonic() - started:4.0f} s", flush=True)


def load_reference(base: str) -> Reference:
    """The base's reference, made if it is not there."""
    return Reference.load(default_folder(base, None)) if has_reference(base, None) else md.make_reference(base)


def main() -> None:
    """Run the steps, and print what there is."""
    arguments = parse()
    suite = Suite(arguments.base, arguments.out, Texts(arguments.published, arguments.rows))
    wanted = [member for member in members() if fnmatch(member.name, arguments.only)]
    if not wanted:
        raise InputError(f"--only {arguments.only}: no member has such a name; suite_members.py lists them")
    reasons = {member: reason for member in wanted if (reason := suite.texts.missing(member))}
    for member, reason in reasons.items():
        print(f"left out: {member.name}: {reason}")
    wanted = [member for member in wanted if member not in reasons]
    first, count = map(int, arguments.shard.split("/"))
    run(suite, wanted[first::count], arguments.steps.split(","))
    if "show" in arguments.steps.split(","):
        figures = show(suite, wanted)
        print("\n" + "\n".join(f"{name:<28}{value:8.3f}" for name, value in figures.items()))
        if arguments.json:
            print(json.dumps({"ratios": figures, "machine": platform.machine(), "torch": torch.__version__}))


def run(suite: Suite, share: Sequence[Member], steps: Sequence[str]) -> None:
    """What costs time, and before it what it costs."""
    if {"cost", *WORK} & set(steps):
        print_cost(suite, share, [step for step in WORK if step in steps] or WORK)
    if "train" in steps:
        train_all(suite, share)
    trained = [member for member in share if suite.is_trained(member)]
    if "audit" in steps:
        audit_all(suite, trained)
        measure_published(suite, trained)
    if "repair" in steps:
        repair_all(suite, trained)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = suite_parser(__doc__)
    parser.add_argument("--steps", default=",".join((*WORK, "show")))
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth member from the Ith on, for several processes")
    parser.add_argument("--rows", type=int, default=ROWS, help="fewer rows of each source, to try the steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
