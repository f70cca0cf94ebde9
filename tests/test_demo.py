"""The five scripts in order, as processes, on the demo: what a stranger runs first."""
import csv

import pytest

from conftest import error_of, run_process, run_script

STAGES = ["01_fetch_annotations.py", "02_embed.py", "03_prepare_data.py", "04_train.py", "05_eval.py"]


def pearson_delta(root, model, seed=""):
    """Mean Pearson delta on the top 20 genes of the unseen single targets."""
    wanted = {"model": model, "seed": seed, "subgroup": "unseen_single", "metric": "pearson_delta_top20"}
    with open(root / "results/demo/metrics.csv", newline="") as file:
        values = [float(row["value"]) for row in csv.DictReader(file) if wanted.items() <= row.items()]
    return sum(values) / len(values)


def test_the_five_scripts_run_in_order_from_any_folder_and_language_beats_the_mean(tmp_path):
    options = {"04_train.py": ["--variant", "scgenept_go_all", "--epochs", 3]}
    for stage, after in zip(STAGES, STAGES[1:]):
        done = run_process(stage, *options.get(stage, []), cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
        assert f"next: python {after}" in done.stdout
    console = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}  # lacks the character that the report has
    done = run_process("05_eval.py", cwd=tmp_path, env=console)
    assert "Pearson ? top 20" in done.stdout
    assert "Pearson Δ top 20" in (tmp_path / "results/demo/report.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs", "results"}
    language = pearson_delta(tmp_path, "scgenept_go_all", "42")
    assert language > pearson_delta(tmp_path, "non-ctrl-mean") + 0.5


@pytest.mark.parametrize("stage, before", [("02_embed.py", "01_fetch_annotations.py"),
                                           ("04_train.py", "03_prepare_data.py"),
                                           ("05_eval.py", "03_prepare_data.py")])
def test_a_stage_run_before_its_predecessor_names_it(tmp_path, monkeypatch, stage, before):
    monkeypatch.chdir(tmp_path)
    assert f"run first: python {before}" in error_of(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_examples_first_and_defaults(stage):
    shown = run_script(stage, "--help").stdout
    assert shown.startswith(f"usage: python {stage} [options]\n\nStage ")
    examples, _, options = shown.partition("options:")
    assert f"python {stage}" in examples.partition("Stage ")[2]
    assert "--dataset" in options
    assert "default: demo" in options


@pytest.mark.parametrize("stage", ["04_train.py", "05_eval.py"])
def test_threads_that_wait_let_other_programs_work(stage):
    shown = run_process(stage, "--help", env={"OMP_DISPLAY_ENV": "VERBOSE"}).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("PyTorch was built with another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '0'" in shown


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_option_is_one_line_that_says_where_the_options_stand(tmp_path, stage):
    error = error_of(stage, "--datset", "x", root=tmp_path)
    assert "unrecognized arguments: --datset x" in error
    assert f"python {stage} --help" in error


@pytest.mark.soak
def test_over_three_seeds_what_the_texts_say_decides(tmp_path):
    seeds = ("42", "23", "89")
    for stage in STAGES:
        options = ["--seed", *seeds] if stage == "04_train.py" else []
        run_process(stage, *options, cwd=tmp_path, timeout=1800)

    def mean(model):
        return sum(pearson_delta(tmp_path, model, seed) for seed in seeds) / 3
    language = mean("scgenept_go_all")
    assert language > mean("scgpt") + 0.15
    assert language > mean("scgenept_go_all-shuffled") + 0.15
    assert language > pearson_delta(tmp_path, "non-ctrl-mean") + 0.3
