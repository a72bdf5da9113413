"""The studies of the pocket world, one command each; every command prints its table and saves it.

    python examples/world_study.py switch    runs/sharing out   # sharing: recall, shift, efficacy
    python examples/world_study.py knobs     runs out           # other knobs against the default
    python examples/world_study.py training  runs/sharing out   # the checkpoints along training
    python examples/world_study.py frequency runs/sharing out   # frequent and rare subjects
    python examples/world_study.py defences  runs/defences out  # defences of worlds and models
    python examples/world_study.py heads     runs/sharing out   # where the hijack lives
    python examples/world_study.py memory    runs/one-layer out # OV circuits as memories
    python examples/world_study.py planted   5 out              # searches against a planted truth
    python examples/world_study.py posterior 1000000 out        # the exact posterior, by sampling

The first folder holds worlds that `hijacklens world --vary ...` made; docs/world/README.md has the
commands. Intervals are 95%, over seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

import hijacklens as hl
from analyses.bridge.world import NEGATION, TALK, readings, summary
from analyses.reproduction.check import mean
from hijacklens import plots
from hijacklens.facts.records import facts_from_records
from hijacklens.world.circuits import PlantedCircuit, plant
from hijacklens.world.distribution import Documents
from hijacklens.world.trained import TrainedWorld
from probes import account, attention, heads, memory_fit, patching
from probes.memory_fit import associations

DOSES = tuple(range(6))
THREE = 3
FRESH = hl.Execution(store=False)


def worlds(folder: str) -> Iterator[TrainedWorld]:
    """The finished worlds in a folder."""
    for path in sorted(Path(folder).rglob("world.json")):
        yield hl.load_world(path.parent)


def labels(trained: TrainedWorld) -> dict[str, Any]:
    """What distinguishes worlds: the knobs and settings that differ from the defaults."""
    default = {**hl.World().record(), **vars(type(trained.recipe)())}
    here = {**trained.world.record(), **vars(trained.recipe)}
    changed = {k: v for k, v in here.items() if v != default[k] and k not in ("seed", "sharing")}
    name = ", ".join(f"{key} {value}" for key, value in changed.items()) or "default"
    return {"world": name, "sharing": trained.world.sharing, "seed": trained.recipe.seed}


def interval(values: pd.Series) -> str:
    """Mean with its interval over seeds."""
    found = mean(values)
    if len(values) < 2:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def over_seeds(table: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """A row per group with the number of seeds and the mean of each column over seeds."""
    groups = table.groupby(by, sort=False)
    return groups[columns].agg(interval).assign(seeds=groups["seed"].nunique()).reset_index()


def switch(folder: str, out: Path) -> pd.DataFrame:
    """Recall, shift and efficacy by sharing, scheme and dose, for each kind of world."""
    parts = [
        summary(readings(each, doses=DOSES)).assign(**labels(each), **each.scores)
        for each in worlds(folder)
    ]
    table = pd.concat(parts, ignore_index=True)
    table["gap"] = table["shift"] - table["ratio"]
    table.to_csv(out / "switch-seeds.csv", index=False)
    columns = ["recall_frequent", "recall", "efficacy", "shift", "ratio", "gap", "slope", "r2"]
    return over_seeds(table, ["world", "sharing", "scheme", "dose"], columns)


def knobs(folder: str, out: Path) -> pd.DataFrame:
    """Worlds with sharing 1 that differ in one knob, and their change from the default, by seed."""
    rows = []
    for each in worlds(folder):
        if each.world.sharing < 1:
            continue
        table = summary(readings(each, doses=(0, THREE))).set_index(["scheme", "dose"])
        talk, negation = (table.loc[scheme.name] for scheme in (TALK, NEGATION))
        measured = {
            "talk": talk["shift"][THREE],
            "negation": negation["shift"][THREE],
            "rise": talk["efficacy"][THREE] - talk["efficacy"][0],
        }
        ratios = {"ratio talk": talk["ratio"][THREE], "ratio negation": negation["ratio"][THREE]}
        bare = {"bare": talk["efficacy"][0]}
        rows.append({**labels(each), **each.scores, **bare, **measured, **ratios})
    table = pd.DataFrame(rows).drop_duplicates(["world", "seed"])
    default = table[table["world"] == "default"].set_index("seed")
    for name in measured:
        table[f"{name} - default"] = table[name] - table["seed"].map(default[name])
    table.to_csv(out / "knobs-seeds.csv", index=False)
    columns = [c for c in table if c not in ("world", "sharing", "seed", "loss", "exact_loss")]
    return over_seeds(table, ["world"], columns)


def defences(folder: str, out: Path) -> pd.DataFrame:
    """What each defence undoes: over worlds, in other models, and the rank correlation of both."""
    parts = []
    for path in sorted(Path(folder).glob("**/result.json")):
        result = hl.load_result(path.parent)
        table = result.defences.assign(seed=path.parent.name)
        if result.settings.facts.name == "facts.jsonl":
            table["model"] = "world"
        parts.append(table[~table["method"].str.startswith("placebo")])
    table = pd.concat(parts, ignore_index=True)
    table.to_csv(out / "defences-seeds.csv", index=False)
    world = table[table["model"] == "world"].groupby("method", sort=False)["undone"]
    found = pd.DataFrame({"world": world.agg(interval), "mean": world.mean()})
    others = table[table["model"] != "world"].groupby(["model", "scheme"], sort=False)
    for (model, scheme), rows in others:
        undone = rows.set_index("method")["undone"]
        found[f"{model}, {scheme}"] = undone
        both = found[["mean"]].join(undone).dropna().drop(["nothing", "oracle"], errors="ignore")
        rank = stats.spearmanr(both["mean"], both["undone"])
        print(f"{model}, {scheme}: rho {rank.statistic:.2f}, p {rank.pvalue:.3f}, n {len(both)}")
    return found.drop(columns="mean").reset_index()


def training(folder: str, out: Path) -> pd.DataFrame:
    """Margins at every checkpoint: what is recalled, and how far three sentences shift it."""
    rows = []
    for each in worlds(folder):
        for step, path in each.checkpoints.items():
            items = readings(each, doses=(0, 3), folder=path)
            bare: Any = items[(items.dose == 0) & (items.scheme == TALK.name)]
            known = {case: top == true for case, top, true in _tops(each, bare)}
            row: dict[str, Any] = {"step": step, "recall": np.mean(list(known.values()))}
            for scheme in (NEGATION, TALK):
                three: Any = items[(items.dose == 3) & (items.scheme == scheme.name)]
                row[scheme.name] = three["shift"].mean()
                row[f"flips {scheme.name}"] = (three.margin > 0).mean() - (bare.margin > 0).mean()
            rows.append({**labels(each), **row})
    table = pd.DataFrame(rows)
    table.to_csv(out / "training-seeds.csv", index=False)
    draw_training(table, out)
    names = [TALK.name, NEGATION.name]
    return over_seeds(table, ["world", "sharing", "step"], ["recall", *names])


def draw_training(table: pd.DataFrame, out: Path) -> None:
    """Shift and recall by step, a column per value of sharing, with 95% bands over seeds."""
    shared = sorted(table["sharing"].unique(), reverse=True)
    size = {"width": plots.PAGE / len(shared), "height": 2.2}
    with plots.canvas(2, len(shared), **size) as (figure, axes):
        for k, sharing in enumerate(shared):
            rows = table[table.sharing == sharing]
            above, below = axes[k], axes[k + len(shared)]
            for panel, names in ((above, (TALK.name, NEGATION.name)), (below, ("recall",))):
                for i, name in enumerate(names, start=2 * (panel is below)):
                    groups = rows.groupby("step")[name]
                    found = [mean(values) for _, values in groups]
                    x, (colour, marker) = list(groups.groups), plots.series(i)
                    middle = [each.value for each in found]
                    panel.plot(x, middle, marker=marker, color=colour, label=name, ms=4)
                    ends = [each.low for each in found], [each.high for each in found]
                    panel.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0)
                panel.set(xscale="log")
            above.set_ylim(-0.3, 4.5)
            below.set(ylim=(-0.05, 1.05), xlabel="step")
            above.set_title(f"sharing {sharing:g}", fontsize=9)
        axes[0].set_ylabel("shift of three\nsentences (nats)")
        axes[len(shared)].set_ylabel("recall (fraction)")
        plots.legend_below(figure, axes, bars="95% intervals over seeds (shaded)")
        plots.write(figure, out / "training.png")


def _tops(trained: TrainedWorld, items: Any) -> Iterator[tuple[int, str, str]]:
    """Case id, top prediction and true target of each query."""
    true = {query["case_id"]: query["target_true"] for query in trained.world.queries()}
    for row in items.itertuples():
        yield row.case_id, str(row.top_token).strip(), true[row.case_id]


def frequency(folder: str, out: Path) -> pd.DataFrame:
    """Recall and shift by the frequency of the subject, in five groups of equal size."""
    parts = []
    for each in worlds(folder):
        items = readings(each, doses=(0, 3))
        bare = items[(items.dose == 0) & (items.scheme == TALK.name)]
        right = {case: top == true for case, top, true in _tops(each, bare)}
        items["recall"] = items["case_id"].map(right).astype(float)
        rank = items["case_id"] * 5 // (items["case_id"].max() + 1)
        items["frequency"] = rank.map(lambda i: ("most", "2nd", "3rd", "4th", "least")[int(i)])
        items["efficacy"] = (items["margin"] > 0).astype(float)
        three = items[items.dose == 3]
        means: Any = three.groupby(["frequency", "scheme"], sort=False)[
            ["recall", "shift", "efficacy"]
        ].mean()
        parts.append(means.reset_index().assign(**labels(each)))
    table = pd.concat(parts, ignore_index=True)
    table.to_csv(out / "frequency-seeds.csv", index=False)
    by = ["world", "sharing", "scheme", "frequency"]
    return over_seeds(table, by, ["recall", "efficacy", "shift"])


def by_account(model: Any, pairs: Any) -> np.ndarray:
    """What each head writes to the shift, [layer head], as a mean over pairs."""
    found = []
    for pair in pairs:
        plus, minus = (
            model.tokenizer(target).input_ids[0]
            for target in (pair.fact.target_false, pair.fact.target_true)
        )
        questions = []
        for prompt in (pair.bare, pair.hijacked):
            ids = tuple(model.tokenizer(prompt.text).input_ids)
            questions.append(account.Question(ids, len(ids) - 1, plus, minus))
        bare, hijacked = account.accounts(model, questions)
        found.append(hijacked.by_head - bare.by_head)
    return np.mean(found, axis=0)


def by_patching(model: Any, pairs: Any) -> np.ndarray:
    """The fraction of the shift that patching each head restores, [layer head]."""
    rows = patching.sweep_heads(model, pairs, quiet=True).summary()
    grid = np.zeros((model.cfg.n_layers, model.cfg.n_heads))
    for row in rows.itertuples():
        grid[row.layer, row.head] = row.share
    return grid


def by_knock_out(model: Any, pairs: Any, facts: Any) -> np.ndarray:
    """How much of the shift is lost without the attention of each head to the mention."""

    def shift(*probes: Any) -> float:
        options: Any = {"schemes": [NEGATION], "doses": (0, 1), "execution": FRESH, "quiet": True}
        items = hl.hijack(model, facts, probes=list(probes), **options).items
        margins = items.assign(margin=items.first_false - items.first_true)
        return float(margins.groupby("dose")["margin"].mean().diff().iloc[-1])

    grid, whole = np.zeros((model.cfg.n_layers, model.cfg.n_heads)), shift()
    for layer, head in np.ndindex(*grid.shape):
        cut = attention.knock_out(source="last", target="mention", heads=[(layer, head)])
        grid[layer, head] = whole - shift(cut)
    return grid


def largest(grid: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The heads with the largest values."""
    order = np.argsort(-grid, axis=None)[:count]
    return [tuple(map(int, np.unravel_index(i, grid.shape))) for i in order]


def planted(seeds: str, out: Path) -> pd.DataFrame:
    """Precision of four methods against planted circuits, at the size of the truth."""
    world = hl.World(bits=3, subjects=24, name_words=1, relations=1, wordings=1)
    facts = facts_from_records(list(world.queries()), name="planted")
    rows = []
    for seed in range(int(seeds)):
        for chain in (False, True):
            truth = plant(world, seed=seed, chain=chain, noise=0.5)
            rows += _scores(truth, facts, seed, "chain" if chain else "direct")
    table = pd.DataFrame(rows)
    table.to_csv(out / "planted-seeds.csv", index=False)
    return over_seeds(table, ["circuit", "method"], ["precision", "chance"])


def _scores(truth: PlantedCircuit, facts: Any, seed: int, circuit: str) -> list[dict[str, Any]]:
    model = hl.load_model(truth.model, tokenizer=truth.tokenizer, name="planted")
    pairs = hl.pairs(model, facts, scheme=NEGATION, dose=1)
    size = len(truth.carriers)
    search = heads.search(model, pairs, size=size, candidates=2 * size, execution=FRESH, quiet=True)
    found = {
        "heads.search": list(search.heads),
        "account": largest(by_account(model, pairs), size),
        "patching": largest(by_patching(model, pairs), size),
        "knock-out": largest(by_knock_out(model, pairs, facts), size),
    }
    total = model.cfg.n_layers * model.cfg.n_heads
    return [
        {
            "circuit": circuit,
            "method": method,
            "seed": seed,
            "precision": truth.precision(chosen),
            "chance": size / total,
            "missed": sorted(truth.carriers - set(chosen)),
            "relay": truth.relay,
            "wrong": sorted(set(chosen) - truth.carriers),
            "recall_head": truth.recall,
        }
        for method, chosen in found.items()
    ]


def where(folder: str, out: Path) -> pd.DataFrame:
    """What attention and MLPs of each layer write to the shift of three sentences of talk."""
    rows = []
    for each in worlds(folder):
        if each.world.sharing < 1:
            continue
        model = hl.load_model(each.model)
        facts = hl.load_facts(each.facts).limit(100, seed=0)
        parts = []
        for pair in hl.pairs(model, facts, scheme=TALK, dose=3):
            ids = [tuple(model.tokenizer(p.text).input_ids) for p in (pair.bare, pair.hijacked)]
            plus, minus = (
                model.tokenizer(target).input_ids[0]
                for target in (pair.fact.target_false, pair.fact.target_true)
            )
            asked = [account.Question(row, len(row) - 1, plus, minus) for row in ids]
            bare, hijacked = account.accounts(model, asked)
            difference = [hijacked.by_head - bare.by_head, hijacked.mlp - bare.mlp]
            whole = hijacked.whole - bare.whole
            parts.append((*difference, whole))
        by_head, mlp, whole = (np.mean([part[i] for part in parts], axis=0) for i in range(3))
        row = {"shift": whole, "largest head": by_head.max(), "where": largest(by_head, 1)[0]}
        for layer in range(model.cfg.n_layers):
            row |= {f"attention {layer}": by_head[layer].sum(), f"MLP {layer}": mlp[layer]}
        rows.append({**labels(each), **row})
    table = pd.DataFrame(rows)
    table.to_csv(out / "heads-seeds.csv", index=False)
    columns = [c for c in table if c not in ("world", "sharing", "seed", "where")]
    return over_seeds(table, ["world", "sharing"], columns)


def memory(folder: str, out: Path) -> pd.DataFrame:
    """Memory fit of OV circuits: an object looks up the objects near it, a name its objects."""
    tables = []
    for each in worlds(folder):
        world, model = each.world, hl.load_model(each.model)
        ids = [world.ids[word] for word in world.objects]
        near = world.related >= np.sort(world.related)[:, [-1 - world.bits]]
        pairs = {
            "object to related objects": [
                (ids[a], ids[b]) for a, b in zip(*near.nonzero(), strict=True)
            ],
            "last name to true objects": [
                (world.ids[name[-1]], ids[home])
                for homes in world.homes
                for name, home in zip(world.names, homes, strict=True)
            ],
        }
        for label, listed in pairs.items():
            associated = associations.pairs(listed, label=label)
            fit = memory_fit.fit({"model": model}, associated, draws=99, quiet=True)
            found = fit.summary().assign(associations=label, **labels(each))
            tables.append(found)
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(out / "memory-seeds.csv", index=False)
    by = ["world", "associations", "statistic"]
    return over_seeds(table, by, ["value", "z", "p_family", "significant"])


def posterior(count: str, out: Path) -> pd.DataFrame:
    """The exact posterior of an object against its frequency in sampled documents."""
    world = hl.World(bits=2, subjects=6, name_words=1, relations=1, wordings=1, length=12)
    reader, documents = hl.Reader(world), Documents(world)
    contexts = [
        (talk, f"{world.names[s][0]} lives in")
        for talk in ("", *(f"People talk about {o} and {o}." for o in world.objects))
        for s in range(3)
    ]
    prompts = [world.tokens(f"{talk} {query}") for talk, query in contexts]
    counts = np.zeros((len(prompts), world.n_objects))
    ids = np.array([world.ids[word] for word in world.objects])
    for i in range(-(-int(count) // 10_000)):
        batch = documents.batch(i, 10_000)
        for row, prompt in enumerate(prompts):
            after = batch[(batch[:, : len(prompt)] == prompt).all(1), len(prompt)]
            counts[row] += (after[:, None] == ids).sum(0)
    rows = []
    for (talk, query), seen, prompt in zip(contexts, counts, prompts, strict=True):
        exact, total = reader.posterior(world.text(prompt)), seen.sum()
        error = np.sqrt(exact * (1 - exact) / total)
        row = {"context": talk, "query": query, "documents": int(total)}
        row["largest difference"] = np.abs(seen / total - exact).max()
        row["in standard errors"] = (np.abs(seen / total - exact) / error).max()
        rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(out / "posterior.csv", index=False)
    return table


STUDIES: dict[str, Callable[[str, Path], pd.DataFrame]] = {
    "switch": switch,
    "knobs": knobs,
    "defences": defences,
    "training": training,
    "frequency": frequency,
    "heads": where,
    "memory": memory,
    "planted": planted,
    "posterior": posterior,
}

if __name__ == "__main__":
    study, given, folder = sys.argv[1:]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    table = STUDIES[study](given, place)
    text = table.to_string(index=False)
    (place / f"{study}.txt").write_text(f"{text}\n")
    print(text)
