"""`make experiments` in small: every study for a few steps, resumed, and told on its page."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for needed in ("matplotlib", "pandas", "rich", "sklearn"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from bench.experiments import decay_maps, one_cycle, page, runs, voronoi  # noqa: E402
from bench.experiments.__main__ import PAGE, STUDIES  # noqa: E402
from bench.experiments.methods import METHODS, PACKAGES  # noqa: E402

TINY = runs.Budget(seeds=1, share=0.0, every=5)
DATA = "digits"


@pytest.fixture(scope="module")
def few_points():
    """The Voronoi study with few points to judge by: judging costs more than a few steps."""
    points, voronoi.POINTS = voronoi.POINTS, 200
    voronoi.environment.cache_clear()
    yield
    voronoi.POINTS = points
    voronoi.environment.cache_clear()


@pytest.fixture(scope="module")
def results(tmp_path_factory, few_points):
    """All studies, trained in this process."""
    folder = tmp_path_factory.mktemp("results")
    jobs = [(study, study.runs(TINY, DATA)) for study in STUDIES.values()]
    runs.work(jobs, folder / DATA, 0, None)
    return folder


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda s: s.name)
def test_a_finished_study_has_nothing_left(results, study):
    wanted = study.runs(TINY, DATA)
    assert len({runs.identity(run) for run in wanted}) == len(wanted)
    assert runs.missing(study, results / DATA, wanted) == []
    rows = study.rows(results / DATA, wanted)
    assert len(rows) == len(wanted)
    assert not rows.isna().any(axis=None)
    assert runs.missing(study, results / DATA, study.runs(runs.QUICK, DATA)) != []


def test_the_page_has_a_place_for_each_table_and_plot(results, tmp_path):
    copy, images = tmp_path / "experiments.md", tmp_path / "images"
    copy.write_text(PAGE.read_text())
    page.write_page(copy, images, results, list(STUDIES.values()), TINY)
    text = copy.read_text()
    assert page.NOT_YET not in text
    for study in STUDIES.values():
        assert f"images/experiments/{study.name}.png" in text
        assert (images / f"{study.name}.png").stat().st_size > 10_000
        for name in study.tables(study.rows(results / DATA, study.runs(TINY, DATA))):
            assert f"bench:begin {name} " in text, name
    page.write_page(copy, images, tmp_path / "nothing", list(STUDIES.values()), TINY)
    blocks = re.findall(r"bench:begin", copy.read_text())
    assert copy.read_text().count(page.NOT_YET) == len(blocks) > 10


def invented(train, number=4):
    """A study of numbers."""
    wanted = [{"x": 0.1 * x, "seed": 0} for x in range(number)]
    nothing = lambda *_: {}  # noqa: E731
    return runs.Study("invented", nothing, train, lambda run: 1.0, nothing, nothing), wanted


def test_resumes_after_an_interruption_and_a_torn_row(tmp_path):
    trained = []

    def train(run):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run["x"])
        return {"y": run["x"] / 3}

    study, wanted = invented(train)
    with pytest.raises(KeyboardInterrupt):
        runs.work([(study, wanted)], tmp_path, 0, None)
    path = study.path(tmp_path)
    assert [run["x"] for run in runs.missing(study, tmp_path, wanted)] == [0.2, 0.1 * 3]
    path.write_text(path.read_text()[:-3])  # killed while the second row was written
    left = runs.missing(study, tmp_path, wanted)
    assert [run["x"] for run in left] == [0.1, 0.2, 0.1 * 3]
    trained.clear()
    study = replace(study, train=lambda run: {"y": run["x"] / 3})
    runs.work([(study, left)], tmp_path, 0, None)
    assert study.rows(tmp_path, wanted)["x"].tolist() == [run["x"] for run in wanted]
    assert len(study.rows(tmp_path, wanted[:2])) == 2  # others are of another budget


def test_rows_of_another_version_are_refused(tmp_path):
    study, wanted = invented(lambda run: {"y": 0.0})
    study.path(tmp_path).write_text("x,y\n0.0,1\n")
    with pytest.raises(ValueError, match=r"invented\.csv has the columns.*move it away"):
        runs.missing(study, tmp_path, wanted)


def test_a_failure_names_the_training(tmp_path):
    study, wanted = invented(lambda run: 1 / 0)
    with pytest.raises(RuntimeError, match=r"^invented, x=0\.0/seed=0: division by zero$"):
        runs.work([(study, wanted)], tmp_path, 0, None)


@pytest.mark.slow
def test_another_process_gives_the_same_rows(tmp_path, results):
    study = STUDIES["one-cycle"]
    wanted = study.runs(TINY, DATA)
    runs.work([(study, wanted[:2])], tmp_path, 1, None)
    there, here = (study.rows(folder, wanted[:2]) for folder in (tmp_path, results / DATA))
    keys = list(wanted[0])
    pd.testing.assert_frame_equal(
        there.sort_values(keys, ignore_index=True), here.sort_values(keys, ignore_index=True)
    )


def test_torch_and_warpstep_train_alike(results):
    """Twenty steps from the same weights, on the same batches."""
    rows = STUDIES["one-cycle"].rows(results / DATA, STUDIES["one-cycle"].runs(TINY, DATA))
    keys = ["method", "steps", "lr", "weight_decay", "seed"]
    ours, torchs = (rows[rows["package"] == p].set_index(keys) for p in PACKAGES)
    assert len(ours) == len(torchs) == 2 * len(one_cycle.GRIDS)
    near = ours.join(torchs[["test_loss"]].add_suffix("_torch"))
    assert np.allclose(near["test_loss"], near["test_loss_torch"], rtol=1e-4)


def test_decay_forms_are_warpsteps_alone():
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="torch has no AdamW with decay_form='independent'"):
        METHODS["AdamW, independent"].make(params, "torch", lr=0.1)


def losses(formula):
    """A map of ten learning rates and ten decays."""
    lr, decay = np.logspace(-4, -1, 10), np.logspace(-3, 1, 10)
    values = formula(np.log10(lr)[None] + 2.4, np.log10(decay)[:, None] + 0.9)
    index = pd.Index(decay, name="weight_decay")
    return pd.DataFrame(1 + values, index, pd.Index(lr, name="lr"))


def test_alignment_tells_a_diagonal_from_the_axes():
    along = decay_maps.alignment(losses(lambda x, y: x**2 + y**2))
    assert (along["rows"], along["columns"]) == (0, 0)
    assert abs(along["basin"]) < 0.2
    assert along["in_turn"] == 1
    across = decay_maps.alignment(losses(lambda x, y: 9 * (x + y) ** 2 + 0.01 * y**2))
    assert across["rows"] < -0.9
    assert across["columns"] < -0.9
    assert across["basin"] < -0.9


def test_diverged_losses_do_not_outweigh_the_others():
    rows = pd.DataFrame({"lr": 1.0, "weight_decay": 1.0, "test_loss": [0.1, 0.1, 1e9]})
    assert decay_maps.grid(rows).iloc[0, 0] == pytest.approx(0.1 ** (2 / 3) * 1e3)


def test_labels_are_those_of_the_formula():
    made = voronoi.Environment()
    centres = (made.directions / made.directions.square().sum(0)).T.double()  # c from c / |c|^2
    assert 100 <= len(centres) <= 150
    points, labels = made.draw(100, torch.Generator().manual_seed(3))
    assert points.abs().max() <= 100
    for point, label in zip(points.double(), labels, strict=True):
        values = [(float(point @ c / (c @ c)) - 1) ** 2 for c in centres]
        assert made.labels[int(np.argmin(values))] == label


def test_the_centres_model_can_be_the_partition():
    """With the environment's centres and labels, and a scale that makes the softmax a choice."""
    made = voronoi.Environment()
    model = voronoi.Centres(len(made.labels))
    with torch.no_grad():
        model.centres.copy_((made.directions / made.directions.square().sum(0)).T)
        model.labels.copy_(torch.nn.functional.one_hot(made.labels, 2))
        model.scale.fill_(1e5)
    generator = torch.Generator().manual_seed(4)
    assert voronoi.accuracy(model, made.draw(2000, generator)) > 99


def test_cifar10_is_read_where_a_folder_has_it(tmp_path, monkeypatch):
    import pickle

    from bench.experiments import pictures

    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = np.full((20, 3072), 255, dtype=np.uint8)
        with (tmp_path / name).open("wb") as file:
            pickle.dump({b"data": pixels, b"labels": [int(name == "test_batch")] * 20}, file)
    monkeypatch.setattr(pictures, "load", pictures.load.__wrapped__)  # not cached
    with pytest.raises(FileNotFoundError, match="--cifar10 names it"):
        pictures.pictures("cifar10", 0)
    monkeypatch.setattr(pictures, "cifar10_folder", tmp_path)
    found = pictures.pictures("cifar10", 0)
    sizes = [len(part[1]) for part in (found.train, found.validation, found.test)]
    assert sizes == [90, 10, 20]
    assert found.test[1].all()
    assert not found.train[1].any()
    assert found.model()(found.test[0][:2]).shape == (2, 10)


def test_the_tutorials_network_reads_digits(capsys):
    path = ROOT / "examples" / "digits_cnn.py"
    assert len(path.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location("digits_cnn", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    shapes = [tuple(p.shape) for p in example.CNN(channels=3, pixels=32).parameters()]
    assert shapes[::2] == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64 * 8 * 8), (10, 128)]
    example.main(epochs=2)
    read = [float(x) for x in re.findall(r"([\d.]+)% of the test images", capsys.readouterr().out)]
    assert len(read) == 2
    assert read[-1] > 60
