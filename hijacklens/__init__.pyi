__version__: str

import analyses.defence

from . import views as views
from .errors import InputError as InputError
from .exports.export import export as export
from .facts.atlas import atlas as atlas
from .facts.chat import Chat as Chat
from .facts.fact import Fact as Fact
from .facts.fact import FactSet as FactSet
from .facts.loading import counterfact as counterfact
from .facts.loading import load_facts as load_facts
from .models.loading import load_model as load_model
from .one_layer.model import OneLayerTransformer as OneLayerTransformer
from .one_layer.recipe import Recipe as Recipe
from .one_layer.task import ConceptTask as ConceptTask
from .one_layer.trained import TrainingResult as TrainingResult
from .one_layer.training import train as train
from .probe import HookProbe as HookProbe
from .prompts.prompt import Prompt as Prompt
from .prompts.schemes import Scheme as Scheme
from .prompts.schemes import add_scheme as add_scheme
from .prompts.schemes import schemes as schemes
from .report.writing import write_report as write_report
from .results.result import load_result as load_result
from .scoring.answers import answer as answer
from .scoring.comparison import Comparison as Comparison
from .scoring.comparison import compare as compare
from .scoring.continuing import Generation as Generation
from .scoring.execution import Execution as Execution
from .scoring.generation import answers as answers
from .scoring.hijack import hijack as hijack
from .scoring.pairs import pairs as pairs
from .scoring.power import power as power
from .scoring.result import HijackResult as HijackResult
from .workers.workers import RayEngine as RayEngine
from .world.distribution import Reader as Reader
from .world.trained import load_world as load_world
from .world.training import train_world as train_world
from .world.world import World as World

defend = analyses.defence.defend
