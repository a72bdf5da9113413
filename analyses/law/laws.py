"""Eight laws of the shift, each a formula with parameters, fitted by least squares.

m_k is the margin log p(o_) - log p(o*) at dose k in nats, m_0 the prior log-odds, and the shift
m_k - m_0. A law predicts it from `analyses.law.predictors` alone. Parameters have 95% intervals
clustered by relation: the linear jackknife that leaves out one relation (CR3), and Student's t with
the degrees of freedom of Satterthwaite for independent facts (Bell and McCaffrey 2002). What the
data, or those without one relation, do not fix has an infinite interval. In simulations of 3 to 30
relations of equal or very different size, the intervals cover .94 to .995.

>>> table = pd.DataFrame({"shift": [1.0, 3.0], "relation_id": ["P36", "P103"], "dose": 1})
>>> law = BY_NAME["constant"].fit(table)
>>> law.predict(table).round(6).tolist(), str(law.parameters["c"])
([2.0, 2.0], '2.000 [-10.706, 14.706]')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy.optimize import least_squares
from scipy.special import expit, stdtrit

from analyses.law.predictors import PREDICTORS
from hijacklens.errors import InputError
from hijacklens.statistics import Interval

PENALTIES = 10.0 ** np.arange(-1, 7)
INNER = 5
"""Folds inside the training facts, by relation, that choose the penalty."""
Values = Mapping[str, Any]


def folds(groups: Shaped[np.ndarray, " row"], count: int, *, seed: int) -> Int[np.ndarray, " row"]:
    """Return the fold of each row: groups stay together, and folds have as many groups.

    >>> folds(np.array(["P36", "P36", "P103", "P19"]), 2, seed=0).tolist()
    [1, 1, 0, 0]
    """
    names, codes = np.unique(groups, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(names))[codes] % count


@dataclass(frozen=True)
class LawRecord:
    """What a saved result knows of a law: all but its function."""

    name: str
    formula: str
    source: str
    needs: tuple[str, ...] = ()
    """The predictors that the law reads."""
    start: Mapping[str, float] = field(default_factory=dict)
    """Parameter -> where the search starts."""

    def law(self) -> Law:
        """Return the law with its function.

        Raises:
            InputError: It is not a built-in law.
        """
        names = [item.name for item in fields(LawRecord)]
        built_in = BY_NAME.get(self.name)
        if any(getattr(built_in, name, None) != getattr(self, name) for name in names):
            raise InputError(
                f"the law {self.name!r} ({self.formula}) is your own, and a saved result has no "
                "function of it. Compare the table `facts` of the result again: "
                "law.compare(result.facts, laws=[...])."
            )
        return BY_NAME[self.name]


@dataclass(frozen=True)
class Law(LawRecord):
    """A formula of a few parameters `p` and predictors `x`; `fit` returns a fitted copy."""

    shift: Callable[[Values, Values], Any] = field(default=lambda p, x: 0.0)
    """The formula: the shift in nats from parameters, predictors and `dose`."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    grows: bool = False
    """Whether the law says how the shift grows with the dose."""
    parameters: Mapping[str, Interval] = field(default_factory=dict)
    """Parameter -> estimate with its interval; empty before the fit."""

    def law(self) -> Law:
        """Return the law itself."""
        return self

    def fit(self, table: pd.DataFrame) -> Law:
        """Fit the law to the columns `shift`, `dose`, `relation_id` and the predictors."""
        x, shift = self._columns(table), table["shift"].to_numpy(float)
        found = least_squares(
            lambda values: self.shift(dict(zip(self.start, values, strict=True)), x) - shift,
            list(self.start.values()),
            bounds=np.array([self.bounds.get(name, (-np.inf, np.inf)) for name in self.start]).T,
            x_scale="jac",
        )
        return self._fitted(self.start, found.x, found.jac, found.fun, table)

    def predict(self, table: pd.DataFrame) -> Float[np.ndarray, " row"]:
        """Return the predicted shift of each row in nats; the column `shift` is not read."""
        values = {name: found.value for name, found in self.parameters.items()}
        return self.shift(values, self._columns(table)) * np.ones(len(table))

    def given_first(self) -> Law:
        """Return the law of later doses, given the shift `first` of a fact at dose `first_dose`.

        The growth of the law multiplies that shift.
        """

        def shift(p: Values, x: Values) -> Any:
            before = self.shift(p, {**x, "dose": x["first_dose"]}) * np.ones(len(x["dose"]))
            grown = self.shift(p, x) / np.where(before == 0, np.inf, before)
            return x["first"] * np.where(before == 0, 1, grown)

        return replace(self, needs=(*self.needs, "first", "first_dose"), shift=shift)

    def _columns(self, table: pd.DataFrame) -> dict[str, np.ndarray]:
        return {name: table[name].to_numpy(float) for name in (*self.needs, "dose")}

    def _fitted(
        self, names: Any, values: Any, jacobian: Any, rest: Any, table: Any, penalty: Any = 0.0
    ) -> Any:
        """Return the law with parameters and their intervals, clustered by relation."""
        codes = np.unique(table["relation_id"], return_inverse=True)[1]
        # In units of one size for each column; one that never varies is 0.
        size = np.sqrt(np.square(jacobian).sum(0))
        unit = np.where(size > 1e-9, 1 / np.maximum(size, 1e-9), 0.0)
        errors, df = _jackknife(jacobian * unit, rest, codes, penalty * np.outer(unit, unit))
        half = stdtrit(df, 0.975) * errors * np.where(unit > 0, unit, 1)
        ends = zip(names, values, values - half, values + half, strict=True)
        return replace(self, parameters={k: Interval(*map(float, rest)) for k, *rest in ends})


def _jackknife(x: Any, rest: Any, codes: Any, penalty: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard error of each coefficient over clusters, and its degrees of freedom.

    The error is infinite if the data, or those without one of the clusters, do not fix the
    coefficient: its unit vector is outside their row space.
    """
    own = [codes == each for each in range(codes.max() + 1)]
    grams = np.stack([x[of].T @ x[of] for of in own])
    whole = grams.sum(0) + penalty
    left = np.concatenate([whole[None], whole - grams])
    inverses = np.linalg.pinv(left, rcond=1e-10, hermitian=True)
    held = np.diagonal(inverses @ left, axis1=1, axis2=2).min(0) > 1 - 1e-6
    errors, df = np.full(len(held), np.inf), np.ones(len(held))
    if len(own) < 2 or not held.any():
        return errors, df
    # What the coefficients move by without a cluster.
    bread, without = inverses[0], inverses[1:]
    moves = [inverse @ (x[of].T @ rest[of]) for inverse, of in zip(without, own, strict=True)]
    errors[held] = np.sqrt(np.square(moves).sum(0) * (1 - 1 / len(own)))[held]
    # The covariances of these moves, cluster by cluster, if facts are independent.
    parts, shared = without @ grams, 2 * bread - bread @ (whole - penalty) @ bread
    for i in np.flatnonzero(held):
        covariance = -parts[:, i] @ shared @ parts[:, i].T
        covariance[np.diag_indices(len(own))] += (parts @ without)[:, i, i]
        df[i] = np.trace(covariance) ** 2 / np.square(covariance).sum()
    return errors, df


@dataclass(frozen=True)
class Ceiling(Law):
    """Ridge regression on all predictors.

    The penalty has the smallest error in folds by relation inside the training facts. Coefficients
    are per standard deviation. The relation is no column, since a new relation would have no
    coefficient.
    """

    scale: Sequence[Any] = (0.0, 1.0)
    """Mean and standard deviation of the columns."""

    def fit(self, table: pd.DataFrame) -> Ceiling:
        """Fit the coefficients; choose the penalty inside the table."""
        raw, y = self._terms(table)[:, 1:], table["shift"].to_numpy(float)
        law = replace(self, scale=(raw.mean(0), np.where(raw.std(0) > 1e-9, raw.std(0), np.inf)))
        x, inner = law._terms(table), folds(table["relation_id"].to_numpy(), INNER, seed=0)
        free = np.eye(x.shape[1])
        free[0, 0] = 0  # the mean is not penalised

        def ridge(rows: Any, penalty: float) -> Any:
            gram = x[rows].T @ x[rows] + penalty * free
            return np.linalg.pinv(gram) @ (x[rows].T @ y[rows])

        held = [inner == fold for fold in np.unique(inner)]
        errors = [
            sum(np.square(y[out] - x[out] @ ridge(~out, penalty)).sum() for out in held)
            for penalty in PENALTIES
        ]
        penalty = PENALTIES[int(np.argmin(errors))]
        found = ridge(inner >= 0, penalty)
        names = ["mean", *self.needs, "log dose"]
        law = law._fitted(names, found, x, x @ found - y, table, penalty * free)
        return replace(law, parameters=law.parameters | {"penalty": Interval(*[penalty] * 3)})

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return the shift by the fitted coefficients."""
        *values, _ = (found.value for found in self.parameters.values())
        return self._terms(table) @ np.array(values)

    def given_first(self) -> Ceiling:
        """Return the regression of later doses that has the shift at the first dose as well."""
        return replace(self, needs=(*self.needs, "first"))

    def _terms(self, table: pd.DataFrame) -> np.ndarray:
        """Return a column of ones and the standardised predictors."""
        columns = self._columns(table)
        raw = np.column_stack([*(columns[name] for name in self.needs), np.log(columns["dose"])])
        return np.column_stack([np.ones(len(raw)), (raw - self.scale[0]) / self.scale[1]])


def _mixed(p: Values, x: Values) -> Any:
    amount = x["dose"] * x["tokens_sentence"] / x["tokens_query"]
    evidence = p["e0"] + p["e"] * (x["sentence_false"] - x["sentence_true"])
    return amount * (evidence - p["c"] * x["prior"]) / (1 + amount * p["c"])


LAWS: tuple[Law, ...] = (
    Law(
        "constant", "c", "the null law: every fact shifts alike",
        start={"c": 0.0}, shift=lambda p, x: p["c"],
    ),
    Law(
        "prior", "a + t log p(o*) + f log p(o_)", "regression to the prior",
        ("logp_true", "logp_false"), start={"a": 0.0, "t": 0.0, "f": 0.0},
        shift=lambda p, x: p["a"] + p["t"] * x["logp_true"] + p["f"] * x["logp_false"],
    ),
    Law(
        "additive", "gamma k^(1 - alpha)",
        "Bigelow et al. 2025, arXiv 2511.00617: evidence adds to the log-odds b = m_0",
        grows=True, start={"gamma": 1.0, "alpha": 0.5},
        shift=lambda p, x: p["gamma"] * x["dose"] ** (1 - p["alpha"]),
    ),
    Law(
        "logistic", "a + b sigmoid(m_0) - m_0",
        "Rana 2026, arXiv 2601.08070: violations are sigmoid(-2.40 + 2.27 P0)",
        ("prior",), start={"a": 0.0, "b": 1.0},
        shift=lambda p, x: p["a"] + p["b"] * expit(x["prior"]) - x["prior"],
    ),
    Law(
        "saturation", "(lambda - m_0) (1 - (1 - beta)^k)",
        "Rescorla and Wagner 1972; for contexts Wang et al. 2025, arXiv 2509.04500",
        ("prior",), grows=True, start={"lambda": 1.0, "beta": 0.5}, bounds={"beta": (1e-6, 1.0)},
        shift=lambda p, x: (p["lambda"] - x["prior"]) * (1 - (1 - p["beta"]) ** x["dose"]),
    ),
    Law(
        # With r sentence tokens per query token the mixing rate is rho_k = k r c / (1 + k r c),
        # and the shift rho_k ((e0 + e s) / c - m_0) for the log-odds s after the sentence alone.
        # Uniform attention of one layer has e0 = 0, e = c = 1; the exact posterior, a sum, c = 0.
        "posterior", "k r (e0 + e s - c m_0) / (1 + k r c)",
        "Jiang et al. 2024, arXiv 2406.18400, section 4 and figure C.13",
        ("prior", "sentence_true", "sentence_false", "tokens_query", "tokens_sentence"),
        grows=True, start={"e0": 0.0, "e": 0.5, "c": 0.5}, bounds={"c": (0.0, np.inf)},
        shift=_mixed,
    ),
    Law(
        "geometry", "a + b copying + c (cos(x, o_) - cos(x, o*)) + d cos(o_, o*)",
        "OV circuits (Elhage et al. 2021); embeddings (Jiang et al. 2024, section 5)",
        ("copying", "similarity_true", "similarity_false", "similarity_targets"),
        start={"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0},
        shift=lambda p, x: p["a"] + p["b"] * x["copying"] + p["d"] * x["similarity_targets"]
        + p["c"] * (x["similarity_false"] - x["similarity_true"]),
    ),
    Ceiling(
        "ceiling", "ridge on all predictors and log k", "Hoerl and Kennard 1970", PREDICTORS,
        grows=True,
    ),
)  # fmt: skip
"""The laws, in the order of the tables."""
BY_NAME = {law.name: law for law in LAWS}
