"""The five scripts in order, as processes, on the demo: what a stranger runs first."""
import csv

import pytest

from conftest import error_of, run_process

STAGES = ["01_fetch_annotations.py", "02_embed.py", "03_prepare_data.py", "04_train.py", "05_eval.py"]


def pearson_delta(root, model, seed):
    """Mean Pearson delta on the top 20 genes of the unseen single targets."""
    with open(root / "results/demo/metrics.csv", newline="") as file:
        wanted = {"model": model, "seed": seed, "subgroup": "unseen_single", "metric": "pearson_delta_top20"}
        values = [float(row["value"]) for row in csv.DictReader(file) if wanted.items() <= row.items()]
    return sum(values) / len(values)


def test_the_five_scripts_run_in_order_from_any_folder_and_language_beats_the_mean(tmp_path):
    for stage in STAGES:
        options = ["--variant", "scgenept_go_all", "--epochs", 7] if stage == "04_train.py" else []
        done = run_process(stage, *options, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
        assert stage == "05_eval.py" or f"next: python {STAGES[STAGES.index(stage) + 1]}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs", "results"}
    assert pearson_delta(tmp_path, "scgenept_go_all", "42") > pearson_delta(tmp_path, "non-ctrl-mean", "") + 0.3
    assert "Pearson Δ top 20" in (tmp_path / "results/demo/report.md").read_text(encoding="utf-8")
    again = run_process("05_eval.py", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})  # a console that lacks the character
    assert "Pearson ? top 20" in again.stdout


@pytest.mark.parametrize("stage, message", [("02_embed.py", "01_fetch_annotations.py"), ("04_train.py", "03_prepare_data.py"),
                                            ("05_eval.py", "03_prepare_data.py")])
def test_a_stage_run_before_its_predecessor_names_it(tmp_path, stage, message):
    done = run_process(stage, cwd=tmp_path, check=False)
    assert done.returncode == 1 and f"run first: python {message}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_examples_first_and_defaults(tmp_path, stage):
    shown = run_process(stage, "--help", cwd=tmp_path).stdout
    assert shown.startswith(f"usage: python {stage} [options]\n\nStage ")
    assert f"python {stage}" in shown.split("options:")[0] and "--dataset" in shown and "default: demo" in shown


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_option_is_one_line_that_says_where_the_options_stand(tmp_path, stage):
    error = error_of(stage, "--datset", "x", root=tmp_path)
    assert "unrecognized arguments: --datset x" in error and f"python {stage} --help" in error


@pytest.mark.soak
def test_over_three_seeds_what_the_texts_say_decides(tmp_path):
    for stage in STAGES:
        run_process(stage, *(["--seed", 42, 23, 89] if stage == "04_train.py" else []), cwd=tmp_path, timeout=1800)
    def mean(model, seeds=("42", "23", "89")):
        return sum(pearson_delta(tmp_path, model, seed) for seed in seeds) / len(seeds)
    language = mean("scgenept_go_all")
    assert language > mean("scgpt") + 0.15 and language > mean("scgenept_go_all-shuffled") + 0.15
    assert language > mean("non-ctrl-mean", [""]) + 0.3

