"""The study: does pretraining pay, and do its masks and its noise? Protocol and results: docs/study.md.

It runs the bundle's own workflows, as users do. It does not repeat a complete run, and continues one that was killed.
The folder of a run names its arm, labels, steps and seed: after a change of any other setting in ``protocol.py``,
remove the folders that it concerns.

    python -m benchmarks.study --data data

- ``pretrain`` runs ``pretrain.json`` for each arm and seed.
- ``segment`` runs ``train.json`` from each arm's weights, from scratch, or with a peer as the network. Then it
  evaluates the test subjects.
- ``robustness`` evaluates again, on test scans with artifacts.
- ``design`` fine-tunes contenders of the design with the first seed. Their test subjects stay unseen.
- ``restore`` does as ``segment`` for denoising and super-resolution, then runs ``benchmarks.restoration`` on the test
  scans.
- ``report`` puts the rows of complete runs into the published ones, ``results/study_*.csv``, and makes of all of them
  the tables with intervals, in ``results`` and in the page, and the picture. It needs neither data nor runs. Before a
  study of other data or with other settings, remove the published rows. ``--gpu results.jsonl`` publishes what
  ``benchmarks/gpu/run.sh ... study`` brought back, too.

``--jobs`` runs share the CPU cores, in the order of their worth: the main arms of one seed, then the next, then the
other stages. ``--full`` adds the other arms, numbers of labels and the peers.
"""

from pathlib import Path

from benchmarks.common import RESULTS, add_runs, argument_parser, save_csv
from benchmarks.study.protocol import ARMS, PEERS, SEEDS, STAGES, TASKS
from benchmarks.study.report import gpu_rows, report
from benchmarks.study.runs import Study, matrix, run_all


def main() -> None:
    parser = argument_parser(__doc__, data=True)
    add_runs(parser, "study", jobs=2)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: random and scheduled; with --full all")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--gpu", type=Path, help="results.jsonl of a GPU, for the report")
    parser.add_argument("--full", action="store_true", help="all arms, numbers of labels and peers")
    args = parser.parse_args()
    study = Study(args.data, args.work_dir, args.jobs)
    if args.stages != ["report"]:
        study.manifest  # noqa: B018  (before hours are spent)
    failed: list[str] = []
    for group in matrix(study, args):
        if cells := [cell for stage, cell in group if stage in args.stages]:
            print(f"{group[0][0]}:", flush=True)
            failed += run_all(cells, args.jobs)
    if "report" in args.stages:
        if args.gpu:
            save_csv(RESULTS / "study_gpu.csv", gpu_rows(args.gpu))
        report(study)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
