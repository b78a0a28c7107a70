"""The parts of the study that are not the bundle's own: intervals, tables, the order of the runs."""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.common import BUNDLE, RESULTS, read_csv, save_csv
from benchmarks.restoration import super_resolution
from benchmarks.study import intervals, protocol, report, runs
from sspformer.engines import EvaluationReport
from sspformer.kspace import fourier_resample


def test_intervals_are_as_wide_as_the_seeds_differ():
    rng = np.random.default_rng(0)
    subjects = rng.normal(0, 0.02, 40)
    alike = np.stack([subjects, subjects, subjects]) + 0.8
    apart = alike + np.array([[-0.05], [0.0], [0.05]])
    (low, high), (wide_low, wide_high) = intervals.interval(alike), intervals.interval(apart)
    assert high - low == pytest.approx(2 * 1.96 * subjects.std() / 40**0.5, rel=0.1)
    assert wide_high - wide_low > 4 * (high - low)
    corrected = intervals.interval(apart, confidence=1 - 0.05 / 16)
    assert corrected[0] < wide_low and corrected[1] > wide_high


def test_differences_are_paired_over_seeds_and_subjects():
    rng = np.random.default_rng(0)
    base = {(seed, subject): rng.normal(0.8, 0.1) for seed in range(3) for subject in "abcdefgh"}
    rows = [
        {"task": "hippocampus", "n_labels": 10, "start": start, "seed": seed, "subject": subject, "dice": dice + gain}
        for (seed, subject), dice in base.items()
        for start, gain in (("scratch", 0.0), ("random", 0.01), ("scheduled", 0.01))
    ]
    lines = {line["arm"]: line for line in intervals.compare(rows[::-1], ["task", "n_labels"], primary=2)}
    difference = lines["random - scratch"]
    assert difference["mean"] == difference["low"] == difference["high_corrected"] == 0.01  # no spread of its own
    assert lines["scratch"]["high"] - lines["scratch"]["low"] > 0.02
    assert "low_corrected" not in lines["scheduled - scratch"]  # not a primary comparison


def test_seeds_are_paired_by_name_and_only_a_complete_comparison_counts():
    def rows(start, seeds, gain):
        return [
            {"task": "hippocampus", "n_labels": 10, "start": start, "seed": seed, "subject": subject}
            | {"dice": 0.1 * seed + gain}
            for seed in seeds
            for subject in "ab"
        ]

    some = rows("scratch", (0, 1, 2), 0.0) + rows("random", (0, 2), 0.01)
    difference = intervals.compare(some, ["task", "n_labels"], primary=2)[-1]
    assert difference["seeds"] == 2 and difference["low"] == difference["high"] == 0.01
    assert "low_corrected" not in difference
    every = some + rows("random", (1,), 0.04)
    difference = intervals.compare(every, ["task", "n_labels"], primary=2)[-1]
    assert difference["mean"] == 0.02 and difference["low_corrected"] == 0.01
    assert difference["low_of_seeds"] == pytest.approx(0.02 - 4.303 * 0.01, abs=1e-4)  # t with 2 degrees of freedom
    with pytest.raises(ValueError, match="subjects"):
        intervals.compare([row for row in every if (row["seed"], row["subject"]) != (1, "b")], ["task"], primary=2)


def test_the_scores_of_an_evaluation_are_collected_with_and_without_artifacts(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    of = runs.Study(tmp_path, tmp_path / "work", jobs=2)
    for folder, dice in (("evaluation", 0.9), ("evaluation_low resolution", 0.6)):
        written = EvaluationReport(
            of.run_of("hippocampus", 126, "scheduled_clean", 1) / folder, ["anterior", "posterior"]
        )
        written.scans = [{"name": "a", "subject": "a"}]
        written(SimpleNamespace(state=SimpleNamespace(metric_details={"dice": torch.tensor([[dice, dice]])})))
    clean, robust = report.collect(of)
    assert len(clean) == len(robust) == 1 and robust[0]["artifact"] == "low resolution"
    assert clean[0]["dice"] == pytest.approx(0.9) and clean[0]["subject"] == "a" and clean[0]["n_labels"] == 126
    assert (clean[0]["start"], clean[0]["seed"]) == ("scheduled_clean", 1)


def test_no_run_starts_from_an_encoder_that_is_still_learning(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    of = runs.Study(tmp_path, tmp_path / "work", jobs=2)
    run = tmp_path / "work" / "pretrain" / "random_1"
    run.mkdir(parents=True)
    epochs = protocol.PRETRAININGS["random"][1]["epochs"]
    (run / "history.csv").write_text(f"epoch\n{epochs - 1}\n")
    with pytest.raises(RuntimeError, match="random 1 is not complete"):
        of.encoder("random", 1)
    encoder = run / "models" / "pretrained" / "encoder.pt"
    encoder.parent.mkdir(parents=True)
    encoder.write_bytes(b"of the epoch before")
    os.utime(encoder, (1, 1))
    (run / "history.csv").write_text(f"epoch\n{epochs}\n")
    with pytest.raises(RuntimeError, match="random 1 is not complete"):  # killed before it wrote the last encoder
        of.encoder("random", 1)
    encoder.write_bytes(b"of the last epoch")
    assert of.encoder("random", 1).parts[-4] == "random_1" and of.encoder("scratch", 1) == "null"


def test_the_gain_of_restoration_is_over_the_degraded_image_and_a_subject_counts_once(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    of = runs.Study(tmp_path, tmp_path, jobs=2)
    settings = protocol.RESTORATION["denoising"][0]
    run = tmp_path / f"denoising_{settings['epochs']}" / "random_clean_0"
    run.mkdir(parents=True)
    rows = ["scan,subject,level,method,psnr"]
    for level, gain in ((0.01, 1.0), (0.09, 3.0)):
        for scan, subject, more in (("a_T1", "a", 0.0), ("a_T2", "a", 1.0), ("b_T1", "b", 0.0)):
            rows += [
                f"{scan},{subject},{level},input,30.0",
                f"{scan},{subject},{level},random_clean,{30 + gain + more}",
            ]
    (run / "quality.csv").write_text("\n".join(rows))
    lines = report.collect_restoration(of)
    gains = {(line["degradation"], line["subject"]): line["gain"] for line in lines}
    assert gains == {("0.01", "a"): 1.5, ("0.01", "b"): 1.0, ("0.09", "a"): 3.5, ("0.09", "b"): 3.0}
    assert {(line["start"], line["seed"]) for line in lines} == {("random_clean", 0)}
    means = report.mean_over(lines, "degradation", "gain", {"denoising": 2})
    assert {line["subject"]: line["gain"] for line in means} == {"a": 2.5, "b": 2.0}
    assert (
        report.mean_over([*lines[:-1], {**lines[-1], "seed": 1}], "degradation", "gain", {"denoising": 2})[0]["subject"]
        == "a"
    )
    summary = intervals.compare(means, ["task"], None, "gain")
    assert summary[0]["mean"] == 2.25


def test_the_measured_kspace_of_the_scan_is_put_back_into_the_region():
    clean = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    low = fourier_resample(clean[None], (8, 8, 8))
    zero_filled, region = fourier_resample(low, (16, 16, 16))[0], (slice(None), *[slice(4, 12)] * 3)
    same = super_resolution.restore_region(zero_filled, low, region, lambda image: image)
    torch.testing.assert_close(same, zero_filled[region], rtol=0, atol=1e-5)
    seen = []
    better = super_resolution.restore_region(
        zero_filled, low, region, lambda image: seen.append(image) or clean[region]
    )
    assert torch.equal(seen[0], zero_filled[region])
    assert (better - clean[region]).square().mean() < 0.5 * (same - clean[region]).square().mean()


def test_the_runs_come_in_the_order_of_their_worth(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    every = {
        "arms": None,
        "peers": list(protocol.PEERS),
        "tasks": list(protocol.TASKS),
        "seeds": [0, 1, 2],
        "stages": protocol.STAGES,
    }
    of = runs.Study(tmp_path, tmp_path / "work", jobs=2)
    some, full = (runs.matrix(of, argparse.Namespace(**every, full=full)) for full in (False, True))
    names = [[cell.name for _, cell in group] for group in full]
    assert names[: len(some)] == [[cell.name for _, cell in group] for group in some]
    assert names[0] == ["pretrain random 0", "pretrain scheduled 0"]
    assert names[1][:3] == [f"segment brain_structures 5 {start} 0" for start in protocol.MAIN]
    flat = [name for group in names for name in group]
    assert len(set(flat)) == len(flat) and not any(cell.complete() for group in full for _, cell in group)
    for name in flat:  # an encoder is there before it is used
        start, seed = name.split()[-2:]
        if name.startswith(("segment", "restore", "design")) and (needed := protocol.STARTS.get(start, [None])[0]):
            assert flat.index(f"pretrain {needed} {seed}") < flat.index(name)
    assert [name for name in flat if name.startswith("design")] == [
        f"design brain_structures 5 {start} 0" for start in protocol.DESIGN if start not in protocol.MAIN
    ]
    peers = [name for name in flat if name.startswith("segment") and "segresnet" in name]
    assert len(peers) == sum(len(task["labels"]) for task in protocol.TASKS.values())


@pytest.mark.parametrize("start", [*protocol.STARTS, "segresnet"])
def test_a_start_is_fine_tuned_as_it_was_pretrained(tmp_path, monkeypatch, start):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    of = runs.Study(tmp_path, tmp_path / "work", jobs=2)
    calls: dict[str, dict] = {}

    def bundle(run_id, config, overlays, options, output):
        options = dict(zip(options[::2], options[1::2], strict=True))
        calls[config if run_id == "training" else run_id] = {**options, "output": output}
        for overlay in overlays:
            assert Path(overlay).is_file() or (BUNDLE / "configs" / f"{overlay}.json").is_file()
        (output / "models/pretrained").mkdir(parents=True, exist_ok=True)
        if run_id == "evaluating":
            (output / "metrics.csv").touch()
        else:
            (output / "history.csv").write_text(f"epoch,iteration,dice\n5,250,0.31\n{options['--epochs']},999,\n")
            (output / "models/pretrained/encoder.pt").touch()

    monkeypatch.setattr(of, "bundle", bundle)
    name, _ = protocol.STARTS.get(start, (None, {}))
    if name:
        with pytest.raises(RuntimeError, match=f"pretrain {name} 1 is not complete"):
            of.segment("brain_structures", 5, start, 1).run()
        of.pretrain(name, 1).run()
        weights = calls["pretrain"]["output"] / "models/pretrained/encoder.pt"
    test = start not in protocol.DESIGN or start in protocol.MAIN
    cell = of.segment("brain_structures", 5, start, 1)
    assert not cell.complete()
    cell.run()
    assert cell.complete() and ("evaluating" in calls) is test
    train = calls["train"]
    assert int(train["--epochs"]) == (80 if start == "segresnet" else 20)  # of 50 steps
    assert (train["--seed"], train["--data_options#max_subjects"], train["--val_interval"]) == (
        "1",
        "5",
        "20" if start == "segresnet" else "5",
    )
    assert train["--pretrained"] == (str(weights) if name else "null")
    assert train.get("--layer_decay") == ("0.65" if name else None if start == "segresnet" else "1.0")
    assert train.get(f"--{protocol.HEAD}") == (
        {"scratch_slow": "1", "tokens_slow": "1", "segresnet": None}.get(start, "10")
    )
    if name:
        assert train.get("--encoder#patch_size", "8") == calls["pretrain"]["--encoder#patch_size"]
        assert train.get("--crop_size", "[64, 64, 64]") == calls["pretrain"]["--crop_size"]
    run = {"task": "brain_structures", "n_labels": 5, "start": start, "seed": 1}
    assert report.collect_curves(of) == [{**run, "step": 250, "dice": 0.31}]


def test_the_table_of_the_design():
    run = {"task": "brain_structures", "n_labels": 5}
    rows = [
        {**run, "start": start, "seed": seed, "step": step, "dice": dice}
        for start, seed, step, dice in (("scratch", 0, 250, 0.2), ("scratch", 0, 500, 0.4), ("tokens_8mm", 0, 250, 0.3))
    ]
    rows += [{**row, "seed": 1, "dice": row["dice"] + 0.1} for row in rows if row["start"] == "scratch"]
    rows += [{**rows[0], "n_labels": 20}, {**rows[0], "start": "segresnet"}]
    assert report.page_tables([], [], rows)["design"].splitlines() == [
        "| start | 250 steps | 500 steps |",
        "| --- | --- | --- |",
        "| scratch | 0.200 | 0.400 |",
        "| tokens of 8 mm | 0.300 |  |",
    ]


def test_how_soon_a_run_is_as_good_as_scratch():
    def curve(start, seed, *dice):
        run = {"task": "hippocampus", "n_labels": 10, "start": start, "seed": seed}
        return [{**run, "step": 100 * (i + 1), "dice": value} for i, value in enumerate(dice)]

    rows = [*curve("scratch", 0, 0.5, 0.7, 0.8), *curve("random", 0, 0.77, 0.8, 0.9), *curve("random", 1, 0.9)]
    rows += curve("tokens", 0, 0.9)  # a contender of the design, which has its own table
    lines = report.speed_table(rows, {"hippocampus": "hippocampus"}).splitlines()
    assert lines[2:] == [
        "| hippocampus, 10 labelled | scratch | 0.800 | 300 |",
        "| hippocampus, 10 labelled | random | 0.900 | 100 |",
    ]


def test_pretrainings_are_tabulated_when_they_are_complete(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,split\n")
    of = runs.Study(tmp_path, tmp_path / "work", jobs=2)
    columns = "epoch,masked_error,high_frequency_error,ssim"
    last = protocol.PRETRAININGS["random"][1]["epochs"]
    for seed, epoch, error in ((0, last, 0.2), (1, last, 0.4), (2, last - 1, 0.9)):
        run = tmp_path / "work" / "pretrain" / f"random_{seed}"
        run.mkdir(parents=True)
        (run / "history.csv").write_text(f"{columns}\n1,0.8,0.8,0.1\n{epoch},{error},0.5,0.6\n")
        (run / "models" / "pretrained").mkdir(parents=True)
        (run / "models" / "pretrained" / "encoder.pt").write_bytes(b"")
    lines = report.collect_pretraining(of)
    assert [(line["arm"], line["seed"], line["masked_error"]) for line in lines] == [
        ("random", 0, 0.2),
        ("random", 1, 0.4),
    ]
    table = report.page_tables([], lines)["pretraining"].splitlines()
    assert table[2].startswith("| random | 2 | 0.3000 [0.2000, 0.4000] |")


def test_a_page_gets_its_tables_anew():
    summary = [
        {"task": "hippocampus", "n_labels": 10, "arm": "scratch", "seeds": 3, "mean": 0.84712},
        {"task": "hippocampus", "n_labels": 10, "arm": "random", "seeds": 3, "mean": 0.85},
        {"task": "hippocampus", "n_labels": 10, "arm": "random - scratch", "seeds": 1}
        | {"mean": 0.0029, "low": -0.0011, "high": 0.005},
        {"task": "denoising", "degradation": "mean of all", "arm": "scratch", "seeds": 3, "mean": 2.0},
    ]
    tables = report.page_tables(summary, [])
    assert tables["main"].splitlines() == [
        "|  | scratch | random | random - scratch |",
        "| --- | --- | --- | --- |",
        "| hippocampus, 10 labelled, Dice | 0.847 | 0.850 | +0.003 [-0.001, +0.005] (1) |",
    ]
    assert tables["pretraining"] == ""
    page = "before\n\n<!-- main -->\n\n| old |\n| --- |\n\nafter\n"
    once = report.with_tables(page, {"main": tables["main"]})
    assert once == f"before\n\n<!-- main -->\n\n{tables['main']}\nafter\n"
    assert report.with_tables(once, {"main": tables["main"]}) == once
    assert report.with_tables("<!-- main -->\n\nafter\n", {"main": tables["main"]}) == once.removeprefix("before\n\n")
    with pytest.raises(ValueError, match="no place for the table"):
        report.with_tables(page, {"robustness": ""})


def test_the_page_of_the_study_shows_what_the_results_say():
    files = sorted(RESULTS.glob("study_*_summary.csv"))
    summary = [row for file in files for row in report.read_results(file.name)]
    others = (report.read_results(f"study_{name}.csv") for name in ("pretraining", "curves"))
    page = protocol.PAGE.read_text()
    tables = report.page_tables(summary, *others) | {"gpu": report.gpu_table(report.read_results("study_gpu.csv"))}
    assert page == report.with_tables(page, tables)


def test_what_a_gpu_brings_back_is_tabulated(tmp_path):
    def line(arm, seed, best, **more):
        options = {"learning_rate": 0.0007, "data_options#max_subjects": 5}
        run = {"kind": "segment", "name": f"segment_{arm}_{seed}_5_0.0007_3000", "steps": 3000, "options": options}
        return json.dumps(run | {"best": best, "last": best, "to_95": 500, "seconds": 60.0, "gpu": "H100"} | more)

    lines = [line("scratch8", 0, 0.7), line("scratch4", 0, 0.6), line("random", 0, 0.75), line("random", 1, 0.8)]
    lines += [json.dumps({"kind": "pretrain", "name": "pretrain_random_0"}), line("random", 2, 0.1, error="no memory")]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    save_csv(tmp_path / "study_gpu.csv", report.gpu_rows(tmp_path / "results.jsonl"))
    rows = [
        {**row, "n_labels": int(row["n_labels"]), "seed": int(row["seed"]), "steps": int(row["steps"])}
        | {name: float(row[name]) for name in ("learning_rate", "best", "to_95")}
        for row in read_csv(tmp_path / "study_gpu.csv")
    ]
    table = report.gpu_table(rows).splitlines()
    assert "| 5 | 3000 | random | 0.0007 | 2 | 0.775 [0.750, 0.800] | +0.050 | 500, 500 |" in table
    assert len(table) == 5


def test_runs_take_the_place_of_the_same_published_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def scores(seed, **dice):
        run = {"task": "hippocampus", "n_labels": 10, "start": "scratch", "seed": seed}
        return [run | {"subject": subject, "dice": score} for subject, score in dice.items()]

    assert report.with_published("rows.csv", scores(0, a=0.8)) == scores(0, a=0.8)
    save_csv(tmp_path / "rows.csv", [*scores(0, a=0.8, b=0.9), *scores(1, a=0.7, b=0.6)])
    assert report.with_published("rows.csv", []) == [*scores(0, a=0.8, b=0.9), *scores(1, a=0.7, b=0.6)]
    together = report.with_published("rows.csv", [*scores(1, a=0.5), *scores(2, a=0.4)])
    assert together == [*scores(0, a=0.8, b=0.9), *scores(1, a=0.5), *scores(2, a=0.4)]


def test_the_published_intervals_are_those_of_the_published_rows():
    rows = report.read_results("study_segmentation.csv")
    wanted = report.read_results("study_segmentation_summary.csv")
    if not rows:
        pytest.skip("no segmentation of the second edition is complete")
    assert len(wanted) > 2
    assert intervals.compare(rows, ["task", "n_labels"], protocol.N_PRIMARY) == wanted


def test_runs_that_start_at_once_write_one_datalist(tmp_path):
    texts = [f"{n}" * 100_000 for n in range(2)]
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda n: runs.keep(tmp_path / "list.json", texts[n % 2]), range(64)))
    assert set(written) == {tmp_path / "list.json"} and written[0].read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["list.json"]
