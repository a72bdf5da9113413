__version__: str

from .concepts.model import OneLayerTransformer as OneLayerTransformer
from .concepts.task import ConceptTask as ConceptTask
from .concepts.trained import TrainingResult as TrainingResult
from .concepts.training import train as train
from .errors import InputError as InputError
from .facts.atlas import atlas as atlas
from .facts.counterfact import counterfact as counterfact
from .facts.fact import Fact as Fact
from .facts.fact import FactSet as FactSet
from .models import load_model as load_model
from .report.document import write_report as write_report
from .results import load_result as load_result
from .schemes import Scheme as Scheme
from .schemes import add_scheme as add_scheme
from .schemes import schemes as schemes
from .scoring.answers import answer as answer
from .scoring.hijack import hijack as hijack
from .scoring.result import HijackResult as HijackResult
