"""Laws of the hijack: which facts give way, predicted from what is known before the hijack.

    run = hl.hijack(model, facts, schemes=["do-not-think"], doses=[0, 1])
    table = law.measured(run, law.predictors(model, facts, ["do-not-think"]))
    result = law.compare(table)
    result.laws                    # R squared, AUC, calibration of eight laws on new relations
    result.explain(774)            # the predicted shift of one fact, its parts, its place
    result.surprises()             # the facts that the best law predicts worst

`laws` has the formulas, `predictors` what they may read, `evaluation` the splits and measures, and
`exact` a task whose posterior is known.
"""

from analyses.law.exact import exact
from analyses.law.laws import LAWS, Law
from analyses.law.predictors import PREDICTORS, measured, predictors, skipped
from analyses.law.result import LawResult, compare

__all__ = [
    "LAWS",
    "PREDICTORS",
    "Law",
    "LawResult",
    "compare",
    "exact",
    "measured",
    "predictors",
    "skipped",
]
