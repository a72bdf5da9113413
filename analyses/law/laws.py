"""Eight laws of the shift, each a formula with parameters, fitted by least squares.

m_k is the margin log p(o_) - log p(o*) at dose k in nats, m_0 the prior log-odds, and the shift
m_k - m_0. A law predicts it from `analyses.law.predictors` alone. The probability that the false
target wins is that of m_k > 0, if errors are normal with the deviation of the training residuals.
Parameters have 95% intervals clustered by relation (sandwich estimate times G / (G - 1), t with
G - 1 degrees of freedom); what the data do not fix has an infinite interval.

>>> table = pd.DataFrame({"shift": [1.0, 3.0], "relation_id": ["P36", "P103"], "dose": 1})
>>> law = BY_NAME["constant"].fit(table)
>>> law.predict(table).round(6).tolist(), str(law.parameters["c"])
([2.0, 2.0], '2.000 [-10.706, 14.706]')
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy.optimize import least_squares
from scipy.special import expit, stdtrit

from analyses.law.predictors import PREDICTORS
from hijacklens.statistics import Interval

PENALTIES = 10.0 ** np.arange(-1, 7)
INNER = 5
"""Folds inside the training facts, by relation, that choose the penalty and the degree."""
Values = Mapping[str, Any]


def folds(groups: Shaped[np.ndarray, " row"], count: int, *, seed: int) -> Int[np.ndarray, " row"]:
    """Return the fold of each row: groups stay together, and folds have similar sizes.

    >>> folds(np.array(["P36", "P36", "P103", "P19"]), 2, seed=0).tolist()
    [0, 0, 1, 1]
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    filled, fold_of = np.zeros(min(count, len(names))), np.zeros(len(names), dtype=int)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return fold_of[codes]


@dataclass(frozen=True)
class Law(ABC):
    """A law; `fit` returns a fitted copy."""

    name: str
    formula: str
    source: str
    needs: tuple[str, ...] = ()
    """The predictors that the law reads."""
    grows: bool = False
    """Whether the law says how the shift grows with the dose."""
    parameters: Mapping[str, Interval] = field(default_factory=dict)
    """Parameter -> estimate with its interval; empty before the fit."""
    deviation: float = float("nan")
    """Standard deviation of the training residuals, in nats."""

    @abstractmethod
    def fit(self, table: pd.DataFrame) -> Any:
        """Fit the law to the columns `shift`, `dose`, `relation_id` and the predictors."""

    @abstractmethod
    def predict(self, table: pd.DataFrame) -> Float[np.ndarray, " row"]:
        """Return the predicted shift of each row in nats; the column `shift` is not read."""

    def _columns(self, table: pd.DataFrame) -> dict[str, np.ndarray]:
        return {name: table[name].to_numpy(float) for name in (*self.needs, "dose")}


@dataclass(frozen=True)
class Formula(Law):
    """A law that is a formula of a few parameters `p` and predictors `x`."""

    start: Mapping[str, float] = field(default_factory=dict)
    """Parameter -> where the search starts."""
    shift: Callable[[Values, Values], Any] = field(default=lambda p, x: 0.0)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def fit(self, table: pd.DataFrame) -> Formula:
        """Fit the parameters by least squares."""
        x, shift, names = self._columns(table), table["shift"].to_numpy(float), list(self.start)
        found = least_squares(
            lambda values: self.shift(dict(zip(names, values, strict=True)), x) - shift,
            list(self.start.values()),
            bounds=np.array([self.bounds.get(name, (-np.inf, np.inf)) for name in names]).T,
            x_scale="jac",
        )
        errors = _errors(found.jac, found.fun, table["relation_id"])
        return _fitted(
            self, dict(zip(names, zip(found.x, errors, strict=True), strict=True)), table
        )

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return the shift by the fitted parameters."""
        values = {name: found.value for name, found in self.parameters.items()}
        return self.shift(values, self._columns(table)) * np.ones(len(table))


@dataclass(frozen=True)
class Ceiling(Law):
    """Ridge regression on all predictors, without or with all their products.

    The penalty and the degree have the smallest error in folds by relation inside the training
    facts. Coefficients are per standard deviation. The relation is no column, since a new relation
    would have no coefficient.
    """

    degree: int = 1
    scales: tuple[np.ndarray, ...] = ()
    """Mean and standard deviation of the columns, then of the terms."""

    def fit(self, table: pd.DataFrame) -> Ceiling:
        """Fit the coefficients; choose penalty and degree inside the table."""
        shift, groups = table["shift"].to_numpy(float), table["relation_id"].to_numpy()
        y, inner = shift - shift.mean(), folds(groups, INNER, seed=0)
        tried = []
        for degree in (1, 2):
            x, scales = self._terms(table, degree)
            parts = [(x[inner == f], y[inner == f]) for f in np.unique(inner)]
            grams, sums = ([a.T @ part[i] for part in parts for a in part[:1]] for i in (0, 1))
            error = np.zeros(len(PENALTIES))
            for (a, b), gram, total in zip(parts, grams, sums, strict=True):
                values, vectors = np.linalg.eigh(sum(grams) - gram)
                turned, seen = vectors.T @ (sum(sums) - total), a @ vectors
                fits = seen @ (turned[:, None] / (values[:, None] + PENALTIES))
                error += ((b[:, None] - fits) ** 2).sum(0)
            tried.append((error.min(), degree, PENALTIES[error.argmin()], x, scales))
        _, degree, penalty, x, scales = min(tried, key=lambda one: one[0])
        bread = np.linalg.inv(x.T @ x + penalty * np.eye(x.shape[1]))
        found = bread @ (x.T @ y)
        errors = _errors(x, x @ found - y, groups, bread)
        names = [*self.needs, "log dose"]
        i, j = np.triu_indices(len(names))
        names += [f"{names[a]} * {names[b]}" for a, b in zip(i, j, strict=True)]
        law = replace(self, degree=degree, scales=scales)
        mean = _errors(np.ones((len(y), 1)), x @ found - y, groups)[0]
        parameters = {"mean": (shift.mean(), mean), "penalty": (penalty, 0.0)}
        rest = zip(names, zip(found, errors, strict=True), strict=False)
        return _fitted(law, parameters | dict(rest), table)

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return the shift by the fitted coefficients."""
        mean, _, *values = (found.value for found in self.parameters.values())
        return mean + self._terms(table, self.degree, self.scales)[0] @ np.array(values)

    def _terms(self, table: pd.DataFrame, degree: int, scales: Any = ()) -> tuple[Any, Any]:
        """Return the standardised columns, for degree 2 with products, and how they are scaled."""
        columns = self._columns(table)
        x = np.column_stack([*(columns[name] for name in self.needs), np.log(columns["dose"])])
        i, j = np.triu_indices(x.shape[1])
        done: list[np.ndarray] = []
        for level in range(degree):
            x = np.hstack([x, x[:, i] * x[:, j]]) if level else x
            done += scales[2 * level : 2 * level + 2] or [x.mean(0), x.std(0)]
            x = (x - done[-2]) / np.where(done[-1] > 1e-9, done[-1], 1)
        return x, tuple(done)


def _errors(jacobian: Any, rest: Any, groups: Any, bread: Any = None) -> np.ndarray:
    """Return standard errors clustered by group; infinite for what the data do not fix."""
    codes = np.unique(groups, return_inverse=True)[1]
    scores = np.zeros((codes.max() + 1, jacobian.shape[1]))
    np.add.at(scores, codes, jacobian * rest[:, None])
    bread = np.linalg.pinv(jacobian.T @ jacobian) if bread is None else bread
    errors = np.sqrt(np.square(scores @ bread).sum(0) * len(scores) / max(len(scores) - 1, 1))
    return np.where((np.abs(jacobian).max(0) < 1e-9) | (len(scores) < 2), np.inf, errors)


def _fitted(law: Any, found: Mapping[str, tuple[Any, Any]], table: pd.DataFrame) -> Any:
    """Return the law with its parameters, their intervals, and its residual deviation."""
    quantile = float(stdtrit(max(table["relation_id"].nunique() - 1, 1), 0.975))
    law = replace(
        law,
        parameters={
            name: Interval(float(x), float(x - quantile * e), float(x + quantile * e))
            for name, (x, e) in found.items()
        },
    )
    rest = table["shift"].to_numpy(float) - law.predict(table)
    return replace(law, deviation=float(np.sqrt(np.mean(rest**2))))


def _mixed(p: Values, x: Values) -> Any:
    amount = x["dose"] * x["tokens_sentence"] / x["tokens_query"]
    evidence = p["e0"] + p["e"] * (x["sentence_false"] - x["sentence_true"])
    return amount * (evidence - p["c"] * x["prior"]) / (1 + amount * p["c"])


LAWS: tuple[Law, ...] = (
    Formula(
        "constant", "c", "the null law: every fact shifts alike",
        start={"c": 0.0}, shift=lambda p, x: p["c"],
    ),
    Formula(
        "prior", "a + t log p(o*) + f log p(o_)", "regression to the prior",
        ("logp_true", "logp_false"), start={"a": 0.0, "t": 0.0, "f": 0.0},
        shift=lambda p, x: p["a"] + p["t"] * x["logp_true"] + p["f"] * x["logp_false"],
    ),
    Formula(
        "additive", "gamma k^(1 - alpha)",
        "Bigelow et al. 2025, arXiv 2511.00617: evidence adds to the log-odds b = m_0",
        grows=True, start={"gamma": 1.0, "alpha": 0.5},
        shift=lambda p, x: p["gamma"] * x["dose"] ** (1 - p["alpha"]),
    ),
    Formula(
        "logistic", "a + b sigmoid(m_0) - m_0",
        "Rana 2026, arXiv 2601.08070: violations are sigmoid(-2.40 + 2.27 P0)",
        ("prior",), start={"a": 0.0, "b": 1.0},
        shift=lambda p, x: p["a"] + p["b"] * expit(x["prior"]) - x["prior"],
    ),
    Formula(
        "saturation", "(lambda - m_0) (1 - (1 - beta)^k)",
        "Rescorla and Wagner 1972; for contexts Wang et al. 2025, arXiv 2509.04500",
        ("prior",), grows=True, start={"lambda": 1.0, "beta": 0.5}, bounds={"beta": (1e-6, 1.0)},
        shift=lambda p, x: (p["lambda"] - x["prior"]) * (1 - (1 - p["beta"]) ** x["dose"]),
    ),
    Formula(
        # With r sentence tokens per query token the mixing rate is rho_k = k r c / (1 + k r c),
        # and the shift rho_k ((e0 + e s) / c - m_0) for the log-odds s after the sentence alone.
        # Uniform attention of one layer has e0 = 0, e = c = 1; the exact posterior, a sum, c = 0.
        "posterior", "k r (e0 + e s - c m_0) / (1 + k r c)",
        "Jiang et al. 2024, arXiv 2406.18400, section 4 and figure C.13",
        ("prior", "sentence_true", "sentence_false", "tokens_query", "tokens_sentence"),
        grows=True, start={"e0": 0.0, "e": 0.5, "c": 0.5}, bounds={"c": (0.0, np.inf)},
        shift=_mixed,
    ),
    Formula(
        "geometry", "a + b copying + c (cos(x, o_) - cos(x, o*)) + d cos(o_, o*)",
        "OV circuits (Elhage et al. 2021); embeddings (Jiang et al. 2024, section 5)",
        ("copying", "similarity_true", "similarity_false", "similarity_targets"),
        start={"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0},
        shift=lambda p, x: p["a"] + p["b"] * x["copying"] + p["d"] * x["similarity_targets"]
        + p["c"] * (x["similarity_false"] - x["similarity_true"]),
    ),
    Ceiling("ceiling", "ridge on all predictors and log k", "Hoerl and Kennard 1970", PREDICTORS),
)  # fmt: skip
"""The laws, in the order of the tables."""
BY_NAME = {law.name: law for law in LAWS}
