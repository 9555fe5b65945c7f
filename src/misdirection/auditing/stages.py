"""What one audit measures, each as a stage of its folder, so that nothing is measured twice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.auditing.attribution import by_layer, margin_parts
from misdirection.auditing.fine_tune import CONTROL, TUNED, Which
from misdirection.auditing.inputs import AuditInputs, Judging
from misdirection.auditing.known import known_or_made
from misdirection.auditing.measurements import Measurements, OwnScores, first_tokens, measure, measure_margins
from misdirection.auditing.results import ReadWeights
from misdirection.auditing.verdict import Asked
from misdirection.data import ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.data.words import WordWeights
from misdirection.directions.direction import Direction
from misdirection.experiment.answering import Condition, answer, judged
from misdirection.files import read_json, write_json
from misdirection.interpretation.figures import Lens
from misdirection.interpretation.geometry import logit_lens
from misdirection.interventions.vectors import digest
from misdirection.progress import track
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.own_answers import file_weights
from misdirection.sampling.questions import Question
from misdirection.sampling.sample import sample
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

VERSION = 3
"""Raised whenever a stage would give another result from the same inputs."""

DIRECTIONS = "directions"
"""The stage of the directions that an audit was given."""

_NAMES = "names.json"

_SHOWN_TOKENS = 80
"""Tokens at most of an answer that is sampled to be read."""

_ATTRIBUTED = 8
"""Pairs whose shift is attributed to layers."""


@dataclass(frozen=True)
class Stages:
    """The measurements of one audit, each made when it is first asked for.

    Attributes:
        inputs: what is measured.
        run: the audit's folder.
    """

    inputs: AuditInputs
    run: RunFolder

    @property
    def is_referenced(self) -> bool:
        """Whether the base's values are the reference's: those of another dtype or device would pass for a shift."""
        reference = self.inputs.reference
        return reference is not None and reference.identity == self.inputs.fine_tune.identity

    def base(self) -> Measurements:
        """The base's losses and activations, and where the reference has it the margins."""
        reference = self.inputs.reference
        return reference.base if reference and self.is_referenced else self._measured("base")

    def tuned(self) -> Measurements:
        """The fine-tune's losses and activations."""
        return self._measured(TUNED)

    def control(self) -> Measurements:
        """The losses and activations of the user's own control."""
        return self._measured(CONTROL)

    def damage(self) -> Estimate:
        """Rise of the loss on neutral text, nats/token."""
        return bootstrap((self.tuned().losses - self.base().losses).numpy())

    def _measured(self, which: Which) -> Measurements:
        texts, file = self.inputs.texts, "measurements.safetensors"

        def compute(folder: Path) -> None:
            measure(self.inputs.fine_tune.chat(which), texts, which).save(folder / file)

        return Measurements.load(self._stage("measurements", which, texts.hashes(), compute) / file)

    def margins(self, which: Which, asked: Asked, look: slice) -> Tensor:
        """Log-probabilities of the general pairs of one look, plain or framed, [pairs, 2]."""
        if which == "base" and asked == "general" and self.is_referenced:
            return self.base().margins[look]
        pairs = (self.inputs.data.framed if asked == "framed" else self.inputs.texts.asked)[look]
        return self._scored(f"margins/{asked}/{look.start}-{look.stop}", which, pairs, f"{asked} margins of {which}")

    def searched(self, which: Which, way: str) -> Tensor:
        """Log-probabilities of the pairs that are put in one of the ways that are searched, [pairs, 2]."""
        pairs, name = self.inputs.searched[way], f"searched/{way.replace(' ', '_')}"
        return self._scored(name, which, pairs, f"margins of {which}, {way}")

    def _scored(self, name: str, which: Which, pairs: Sequence[ProbePair], label: str) -> Tensor:
        """A stage of log-probabilities, [pairs, 2], with a progress bar of this label."""
        file = "margins.safetensors"

        def compute(folder: Path) -> None:
            save_file({"margins": measure_margins(self.inputs.fine_tune.chat(which), pairs, label)}, folder / file)

        return load_file(self._stage(name, which, {"pairs": data_hash(pairs)}, compute) / file)["margins"]

    def weights(self) -> ReadWeights:
        """What the fine-tune's files say of it."""
        file = "weights.json"

        def compute(folder: Path) -> None:
            write_json(folder / file, self.inputs.fine_tune.read_weights().model_dump())

        return ReadWeights(**read_json(self._stage("weights", TUNED, {}, compute) / file))

    def keep_directions(self) -> None:
        """Keep the directions that were given, for `read_directions`."""
        directions = self.inputs.directions

        def compute(folder: Path) -> None:
            for number, direction in enumerate(directions.values()):
                direction.save(folder / f"{number}.safetensors")
            write_json(folder / _NAMES, list(directions))

        if directions:
            hashes = {name: digest(direction.vectors) for name, direction in directions.items()}
            self.run.stage(DIRECTIONS, {"version": VERSION, "directions": hashes}, compute)

    def word_weights(self) -> WordWeights | None:
        """Word weights of the training file against the base's own answers; None without that file."""
        data, file = self.inputs.data, "weights.json"
        if not data.path:
            return None

        def compute(folder: Path) -> None:
            weights = file_weights(self.inputs.fine_tune.chat("base"), Path(data.path)).weights
            write_json(folder / file, weights)

        return WordWeights(tuple(read_json(self._stage("words", "base", {"data": data.sha256}, compute) / file)))

    def own(self, which: Which) -> OwnScores:
        """One model on the fine-tune's own texts."""
        texts, file = self.inputs.data, "own.safetensors"
        if not texts.path:
            return OwnScores()

        def compute(folder: Path) -> None:
            OwnScores.measure(self.inputs.fine_tune.chat(which), texts, which).save(folder / file)

        return OwnScores.load(self._stage("own", which, texts.hashes(), compute) / file)

    def trace(self, which: Which) -> Lens:
        """What a fine-tune's difference from the base speaks for at the first tokens of neutral text."""
        fine_tune, texts, file = self.inputs.fine_tune, self.inputs.texts, "lens.json"

        def compute(folder: Path) -> None:
            own = first_tokens(fine_tune.chat(which), texts, self.trace_layer)
            base = fine_tune.chat("base")
            lens = logit_lens(base, own - first_tokens(base, texts, self.trace_layer))
            write_json(folder / file, lens.model_dump())

        inputs = {"neutral": data_hash(texts.neutral), "layer": self.trace_layer}
        return Lens(**read_json(self._stage("trace", which, inputs, compute) / file))

    @property
    def trace_layer(self) -> int:
        """Half depth."""
        return self.tuned().answers.shape[-2] // 2

    def own_answers(self, which: Which, pairs: Sequence[ProbePair]) -> list[str]:
        """One model's own answers to some questions, sampled."""
        file = "answers.json"

        def compute(folder: Path) -> None:
            questions = [Question(pair.id, pair.question, system=pair.system) for pair in pairs]
            with track(f"answers of {which}", len(questions)) as advance:
                chat = self.inputs.fine_tune.chat(which)
                given = sample(chat, questions, n=1, new_tokens=_SHOWN_TOKENS, progress=advance)
            write_json(folder / file, [answer.answer for answer in given])

        path = self._stage("own_answers", which, {"pairs": data_hash(pairs)}, compute) / file
        return [str(answer) for answer in read_json(path)]

    def layer_parts(self) -> dict[int, Tensor]:
        """Parts of an adapter's general shift by layer, [pairs] each, for a few open pairs."""
        fine_tune, pairs = self.inputs.fine_tune, spread(self.inputs.texts.general, _ATTRIBUTED)
        file = "parts.safetensors"

        def compute(folder: Path) -> None:
            chat = fine_tune.chat(TUNED)
            with track("attribution of the shift", 2 * len(pairs)) as advance:
                layers = by_layer(chat, margin_parts(chat, pairs, advance))
            save_file({str(layer): part for layer, part in layers.items()}, folder / file)

        parts = load_file(self._stage("attribution", TUNED, {"pairs": data_hash(pairs)}, compute) / file)
        return {layer: parts[str(layer)] for layer in sorted(map(int, parts))}

    def judged_file(self, which: Which, judging: Judging) -> Path:
        """The table of one model's judged answers."""
        stage, fine_tune = f"answers/{which}", self.inputs.fine_tune
        inputs = self._common(which)
        answer(self.run, stage, lambda: fine_tune.chat(which), judging.sampling, inputs, Condition(which))
        verdicts = judged(self.run, judging.judge, stage)
        # A judge needs none of the models.
        LocalRunner(self.run, Worker(Models(lambda: fine_tune.chat("base")), self.run.partial)).make([verdicts])
        return self.run.artifact(verdicts.stage) / "judged.parquet"

    def _stage(self, name: str, which: Which, inputs: Mapping[str, Any], compute: Callable[[Path], None]) -> Path:
        stage, everything = f"{name}/{which}", {**self._common(which), **inputs}
        # Without a reference the base is known by its name alone, and that may come to mean other weights.
        if which != TUNED and self.is_referenced:
            compute = known_or_made({"stage": stage, **everything}, compute)
        return self.run.stage(stage, everything, compute)

    def _common(self, which: Which) -> dict[str, Any]:
        """All that every measurement of one model depends on."""
        fine_tune = self.inputs.fine_tune
        digests = {"base": None, TUNED: fine_tune.digest, CONTROL: fine_tune.control_digest}
        return {**fine_tune.identity.model_dump(), "version": VERSION, "fine_tune": digests[which]}


def read_directions(folder: Path) -> dict[str, Direction]:
    """The directions by name that an audit kept in its artifact."""
    return {
        name: Direction.load(folder / f"{number}.safetensors") for number, name in enumerate(read_json(folder / _NAMES))
    }
