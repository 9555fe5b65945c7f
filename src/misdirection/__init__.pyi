# The public names and where each is defined, for type checkers, for editors, and for `__init__.py`, which imports
# a name when it is used.

from misdirection.auditing.audit import audit as audit
from misdirection.auditing.callback import watch as watch
from misdirection.auditing.many import audit_many as audit_many
from misdirection.auditing.reference import make_reference as make_reference
from misdirection.auditing.results import AuditResult as AuditResult
from misdirection.bundles.bundle import bundle as bundle
from misdirection.bundles.results import Bundle as Bundle
from misdirection.bundles.results import VerifyResult as VerifyResult
from misdirection.bundles.verify import verify as verify
from misdirection.data import Example as Example
from misdirection.data import ProbePair as ProbePair
from misdirection.data import domain_examples as domain_examples
from misdirection.data import domain_pairs as domain_pairs
from misdirection.data import neutral_examples as neutral_examples
from misdirection.data import probe_pairs as probe_pairs
from misdirection.data import read_examples as read_examples
from misdirection.data import read_pairs as read_pairs
from misdirection.data import sealed_pairs as sealed_pairs
from misdirection.defending.defend import defend as defend
from misdirection.directions.check import check as check
from misdirection.directions.convergence import Cosines as Cosines
from misdirection.directions.convergence import compare as compare
from misdirection.directions.direction import Direction as Direction
from misdirection.directions.direction import extract as extract
from misdirection.directions.formats import export_direction as export_direction
from misdirection.directions.formats import import_direction as import_direction
from misdirection.directions.results import CheckResult as CheckResult
from misdirection.directions.sweep import Sweep as Sweep
from misdirection.directions.sweep import sweep as sweep
from misdirection.errors import InputError as InputError
from misdirection.errors import MisdirectionError as MisdirectionError
from misdirection.experiment.config import ExperimentConfig as ExperimentConfig
from misdirection.experiment.config import read_config as read_config
from misdirection.experiment.cost import estimate_cost as estimate_cost
from misdirection.experiment.results import RunResults as RunResults
from misdirection.experiment.runner import run_experiment
from misdirection.experiment.several import SeveralConfig as SeveralConfig
from misdirection.experiment.several import read_several as read_several
from misdirection.experiment.several_results import RunsResults as RunsResults
from misdirection.experiment.several_runner import run_several as run_several
from misdirection.hub.transfer import pull as pull
from misdirection.hub.transfer import push as push
from misdirection.interpretation.interpret import interpret as interpret
from misdirection.interpretation.interpret import interpret_tables as interpret_tables
from misdirection.interpretation.results import InterpretationResults as InterpretationResults
from misdirection.interpretation.results import TokenTable as TokenTable
from misdirection.interventions.bake import bake as bake
from misdirection.interventions.hooks import ablate as ablate
from misdirection.interventions.hooks import intervene as intervene
from misdirection.interventions.hooks import steer as steer
from misdirection.interventions.kinds import Ablate as Ablate
from misdirection.interventions.kinds import ScaleAdapters as ScaleAdapters
from misdirection.interventions.kinds import Steer as Steer
from misdirection.interventions.vectors import random_like as random_like
from misdirection.judging.agreement import agree as agree
from misdirection.judging.judge import judge as judge
from misdirection.judging.judges import open_judge as open_judge
from misdirection.judging.rubrics import read_rubrics as read_rubrics
from misdirection.judging.scoring import score as score
from misdirection.likelihood.margin import margin as margin
from misdirection.likelihood.measure import measure_shift as measure_shift
from misdirection.models.chat_model import ChatModel as ChatModel
from misdirection.models.loading import load as load
from misdirection.organisms.organism import Organism as Organism
from misdirection.organisms.recipe import Recipe as Recipe
from misdirection.organisms.training import train as train
from misdirection.playground.serving import play as play
from misdirection.repairing.repair import repair as repair
from misdirection.repairing.results import RepairResult as RepairResult
from misdirection.sampling.answers import read_answers as read_answers
from misdirection.sampling.questions import read_questions as read_questions
from misdirection.sampling.sample import sample as sample
from misdirection.screening.results import ScreenResult as ScreenResult
from misdirection.screening.screen import screen as screen
from misdirection.statistics import Estimate as Estimate
from misdirection.statistics import bootstrap as bootstrap

run = run_experiment

__version__: str
