"""Training by one call: the table, the settings, the files, resuming after a kill, the anchors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from hijacklens.errors import InputError
from hijacklens.one_layer import memory
from hijacklens.one_layer.checkpoint import FILE
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.stacked_runs import StackedRuns
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult
from hijacklens.one_layer.training import train
from hijacklens.results.result import load_result

TASK = ConceptTask(bits=3, length=64)
COLUMNS = "seed lr accuracy accuracy_low accuracy_high bayes_accuracy constructed_accuracy loss"
QUICK = {"d_model": 8, "seeds": 2, "steps": 200, "batch": 32, "evaluation": 1000, "quiet": True}


@pytest.fixture(scope="module")
def trained() -> TrainingResult:
    return train(TASK, **QUICK)


class TestResult:
    def test_the_summary(self, trained: TrainingResult) -> None:
        table = trained.summary()
        assert " ".join(table.columns) == COLUMNS
        assert list(zip(table["lr"], table["seed"], strict=True)) == [
            (0.01, 0), (0.01, 1), (0.001, 0), (0.001, 1),
        ]  # fmt: skip
        assert (table["accuracy_low"] < table["accuracy"]).all()
        assert (table["accuracy"] < table["accuracy_high"]).all()
        assert (table["accuracy"] <= table["bayes_accuracy"] + 0.02).all()
        fast = table[table["lr"] == 0.01]
        assert (fast["accuracy"] > 0.6).all()
        # At .001 the models have hardly left the start, where they guess one in eight.
        assert (table["loss"][table["lr"] == 0.001] > fast["loss"].max()).all()

    def test_the_best_learning_rate_has_the_highest_mean(self, trained: TrainingResult) -> None:
        assert trained.best_learning_rate == 0.01
        assert trained.best() == trained.models[:2]
        record = trained.configuration()
        assert record["best_learning_rate"] == 0.01
        mean = trained.table["accuracy"][:2].mean()
        assert record["means_at_best_learning_rate"]["accuracy"] == pytest.approx(mean)

    def test_the_first_of_equal_learning_rates_is_chosen(self, trained: TrainingResult) -> None:
        table = trained.table.assign(accuracy=0.5)
        assert replace(trained, table=table).best_learning_rate == 0.01

    def test_every_default_of_ours_is_named(self, trained: TrainingResult) -> None:
        ours = trained.configuration()["our_defaults"]
        assert {"d_attn", "batch", "steps", "weight_decay", "init_scale", "evaluation"} <= set(ours)

    def test_curves(self, trained: TrainingResult) -> None:
        curves = trained.curves
        assert list(curves.columns) == ["seed", "lr", "step", "loss"]
        assert len(curves) == 4 * 200
        assert (curves["loss"][curves["step"] == 1] < 3 * math.log(8)).all()
        figure = trained.plot()
        labels = [axes.get_ylabel() for axes in figure.axes]
        assert labels == ["training loss (nats)\nmean, range of seeds", "accuracy"]
        assert any("Bayes" in text.get_text() for text in figure.legends[0].get_texts())
        first = replace(trained, curves=curves[curves["step"] == 1]).plot().axes[0]
        assert {line.get_marker() for line in first.get_lines()[:2]} == {"o"}  # a point is seen


class TestReplacement:
    def test_as_trained_gives_the_summary(self, trained: TrainingResult) -> None:
        table = trained.accuracy()
        assert list(table.columns) == [
            "seed", "lr", "accuracy", "accuracy_low", "accuracy_high", "loss",
        ]  # fmt: skip
        pd.testing.assert_frame_equal(table, trained.summary()[list(table.columns)])

    def test_a_function_of_the_model(self, trained: TrainingResult) -> None:
        table = trained.accuracy(lambda model: memory.constructed(model.W_E, TASK))
        constructed = trained.summary()["constructed_accuracy"]
        # Scale does not change the answer, up to rounding.
        assert (table["accuracy"] - constructed).abs().max() <= 0.001

    def test_one_matrix_for_all(self, trained: TrainingResult) -> None:
        table = trained.accuracy(torch.zeros(8, 8))
        assert table["accuracy"].tolist() == [1 / 8] * 4  # all logits tie: split evenly
        assert table["loss"].tolist() == pytest.approx([math.log(8)] * 4)

    def test_the_models_do_not_change(self, trained: TrainingResult) -> None:
        before = trained.models[0].W_V.clone()
        trained.accuracy(torch.zeros(8, 8))
        assert torch.equal(trained.models[0].W_V, before)

    @pytest.mark.parametrize("start", [None, 0.0], ids=["no near neighbours", "embeddings of 0"])
    def test_where_equation_5_1_is_zero_there_is_no_construction(self, start) -> None:
        apart = ConceptTask(bits=3, length=8, support=lambda a, b: (a ^ b) == 7)
        task = apart if start is None else TASK
        result = train(task, **{**QUICK, "steps": 2}, init_scale=start)
        assert result.summary()["constructed_accuracy"].isna().all()
        assert result.configuration()["means_at_best_learning_rate"]["accuracy"] >= 0


class TestOptions:
    def test_seeds_can_be_named(self) -> None:
        seeds = [7, 1_234_567]
        result = train(TASK, **{**QUICK, "steps": 2, "seeds": seeds}, learning_rates=[0.1])
        assert result.summary()["seed"].tolist() == seeds
        assert [model.config.seed for model in result.models] == seeds
        assert "\n0.1  1234567  " in str(result)

    def test_settings_replace_those_of_a_recipe(self, trained: TrainingResult) -> None:
        recipe = replace(trained.recipe, steps=1, evaluation=10)
        fixed = {"freeze": ["W_V"], "value_init": "identity", "dtype": "float64"}
        result = train(TASK, recipe, seeds=1, **fixed, quiet=True)
        assert result.recipe == replace(recipe, seeds=(0,), **fixed)
        for model in result.models:
            assert torch.equal(model.W_V[0, 0], torch.eye(8, dtype=torch.float64))

    def test_the_width_is_required(self) -> None:
        with pytest.raises(InputError, match=r"give a recipe or d_model, such as d_model=16"):
            train(TASK, seeds=1)

    def test_the_old_name_of_the_width_works_with_a_warning(self) -> None:
        settings = {"steps": 1, "seeds": 1, "evaluation": 10, "quiet": True}
        with pytest.warns(FutureWarning, match="dim= is now called d_model="):
            assert train(TASK, dim=8, **settings).recipe.d_model == 8

    def test_a_run_that_blows_up_is_counted_as_wrong(self) -> None:
        result = train(TASK, **{**QUICK, "steps": 80, "seeds": 1}, learning_rates=(1e6, 0.01))
        table = result.summary()
        assert math.isnan(table["loss"][0])
        assert table["accuracy"][0] == 0.0
        assert result.best_learning_rate == 0.01
        assert "\n1 of 2 runs diverged (no loss): use a lower learning rate\n" in str(result)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"d_model": 0}, "d_model is 0"),
            ({"seeds": 0}, "seeds is 0"),
            ({"seeds": True}, "seeds is True"),
            ({"step": 3}, "unknown training setting 'step'; did you mean 'steps'"),
            ({"quite": True}, "did you mean 'quiet'"),
            ({"dim": 4}, "d_model is given twice, also by its old name dim"),
            ({"seeds": (1, 1)}, r"seeds are \(1, 1\)"),
            ({"learning_rates": ()}, r"learning_rates are \(\)"),
            ({"learning_rates": (-0.1,)}, "lr is -0.1"),
            ({"steps": 0}, "steps is 0"),
            ({"batch": 0}, "batch is 0"),
            ({"evaluation": 0}, "evaluation is 0"),
            ({"device": "gpu"}, "unknown device 'gpu'"),
            ({"device": "cuda:99"}, "device 'cuda:99' does not exist"),
            ({"freeze": ("W_Q",)}, "part to freeze 'W_Q'"),
            ({"freeze": ("W_E", "W_V", "W_QK")}, "something to train"),
        ],
    )
    def test_bad_settings(self, tmp_path, changes: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            train(TASK, **{**QUICK, **changes}, out=tmp_path / "out")
        assert not (tmp_path / "out" / FILE).exists()


class TestFiles:
    def test_saved_and_loaded(self, trained: TrainingResult, tmp_path) -> None:
        folder = trained.save(tmp_path / "run")
        assert {path.name for path in folder.iterdir()} == {
            "summary.csv", "curves.csv", "curve.svg", "curve.png", "models", "result.json",
        }  # fmt: skip
        record = json.loads((folder / "result.json").read_text())
        # Records had no form at first, and the width was called dim.
        del record["form"]
        record["recipe"]["dim"] = record["recipe"].pop("d_model")
        record["type"] = "hijacklens.concepts.trained:TrainingResult"
        (folder / "result.json").write_text(json.dumps(record))
        back = load_result(folder)
        assert isinstance(back, TrainingResult)
        pd.testing.assert_frame_equal(back.table, trained.table, check_exact=True)
        pd.testing.assert_frame_equal(back.curves, trained.curves, check_exact=True)
        assert back.configuration() == trained.configuration()
        assert (back.task, back.recipe) == (trained.task, trained.recipe)
        pd.testing.assert_frame_equal(back.accuracy(), trained.accuracy())
        one = OneLayerTransformer.load(folder / "models" / "seed1-lr0.001")
        assert torch.equal(one.W_V, trained.models[3].W_V)

    def test_a_missing_file_gives_one_error(self, trained: TrainingResult, tmp_path) -> None:
        folder = trained.save(tmp_path / "run")
        (folder / "curves.csv").unlink()
        with pytest.raises(InputError, match="not complete"):
            load_result(folder)
        record = json.loads((folder / "result.json").read_text())
        del record["recipe"]["d_model"]
        (folder / "result.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="not complete"):
            load_result(folder)

    def test_a_finished_folder_is_kept_without_overwrite(self, tmp_path) -> None:
        quick = {**QUICK, "steps": 4, "out": tmp_path}
        train(TASK, **quick)
        assert not (tmp_path / FILE).exists()
        with pytest.raises(InputError, match="already contains a result"):
            train(TASK, **quick)
        (tmp_path / "models" / "seed1-lr0.01" / "notes.txt").write_text("mine")
        train(TASK, **{**quick, "seeds": 1}, overwrite=True)
        assert len(load_result(tmp_path).to_dataframe()) == 2
        # The models of the old result are gone; other files stay.
        files = {str(p.relative_to(tmp_path)) for p in (tmp_path / "models").glob("seed1*/*")}
        assert files == {"models/seed1-lr0.01/notes.txt"}


class Killed(BaseException):
    """A stand-in for SIGKILL: nothing in the library can catch it."""


def watch_steps(monkeypatch: pytest.MonkeyPatch, *, killed_at: int = -1) -> list[int]:
    """Record the steps that runs take from now on, and kill them at one."""
    steps, advance = [], StackedRuns.advance

    def watched(stacked: StackedRuns, count: int) -> None:
        if stacked.done == killed_at:
            raise Killed
        steps.append(stacked.done)
        advance(stacked, count)

    monkeypatch.setattr(StackedRuns, "advance", watched)
    return steps


class TestResuming:
    @pytest.fixture
    def kill_at(self, tmp_path, monkeypatch):
        """Train until a step; return the settings of the killed run."""

        def train_until(step: int, **changes: object) -> dict[str, object]:
            settings = {**QUICK, "out": tmp_path, "checkpoint_seconds": 0.0, **changes}
            with monkeypatch.context() as patch, pytest.raises(Killed):
                watch_steps(patch, killed_at=step)
                train(TASK, **settings)
            assert (tmp_path / FILE).exists()
            return settings

        return train_until

    def test_a_killed_run_resumes_and_ends_the_same(
        self, trained: TrainingResult, tmp_path, kill_at, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kill_at(150)
        assert not (tmp_path / "result.json").exists()
        settings = kill_at(199)
        steps = watch_steps(monkeypatch)
        result = train(TASK, **settings)
        assert steps == list(range(192, 200))
        pd.testing.assert_frame_equal(result.table, trained.table, check_exact=True)
        pd.testing.assert_frame_equal(result.curves, trained.curves, check_exact=True)
        for one, other in zip(result.models, trained.models, strict=True):
            assert torch.equal(one.W_E, other.W_E)
        assert not (tmp_path / FILE).exists()

    def test_another_command_is_refused_without_overwrite(self, kill_at) -> None:
        settings = {**kill_at(130), "d_model": 4}
        refused = r"unfinished run of another command.*d_model is 4, there 8"
        with pytest.raises(InputError, match=refused):
            train(TASK, **settings)
        assert train(TASK, **settings, overwrite=True).recipe.d_model == 4

    def test_with_overwrite_a_run_resumes_itself(
        self, tmp_path, kill_at, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        earlier = train(TASK, **{**QUICK, "steps": 3}, out=tmp_path).table
        settings = kill_at(130, overwrite=True)
        pd.testing.assert_frame_equal(load_result(tmp_path).to_dataframe(), earlier)
        steps = watch_steps(monkeypatch)
        result = train(TASK, **settings)
        assert steps[0] == 128
        pd.testing.assert_frame_equal(load_result(tmp_path).to_dataframe(), result.table)


@pytest.mark.slow
class TestAnchors:
    """The paper's directions at full size; the reference page's section 7 has the numbers."""

    @pytest.mark.parametrize("bits", [5, 6, 7, 8])
    def test_half_the_width_learns_and_holds_a_memory(self, bits: int) -> None:
        task = ConceptTask(bits=bits, length=256)
        seeds = 2 if bits < 8 else 1
        result = train(task, d_model=task.vocab // 2, seeds=seeds, quiet=True)
        best = result.summary()
        best = best[best["lr"] == result.best_learning_rate]
        assert (best["accuracy"] >= 0.97).all()
        assert (best["bayes_accuracy"] - best["accuracy"] <= 0.03).all()
        assert (best["accuracy"] - best["constructed_accuracy"] <= 0.03).all()
        draw = torch.Generator().manual_seed(0)
        chance = result.accuracy(lambda model: memory.random(model.W_E, task, draw))
        assert (chance["accuracy"] < 0.2).all()

    @pytest.mark.parametrize("bits", [5, 6, 7, 8])
    def test_a_trained_value_matrix_beats_the_identity_at_64(self, bits: int) -> None:
        task = ConceptTask(bits=bits, length=64)
        settings = {"d_model": task.vocab // 2, "seeds": 2 if bits < 8 else 1, "quiet": True}
        trained = train(task, **settings)
        fixed = train(task, freeze=("W_V",), value_init="identity", **settings)
        best, other = (
            result.accuracy()["accuracy"][result.table["lr"] == result.best_learning_rate]
            for result in (trained, fixed)
        )
        assert best.min() > other.max() + 0.03
