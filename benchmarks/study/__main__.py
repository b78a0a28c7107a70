"""The study: do the pretraining, its masks and its noise help? Protocol and results: docs/study.md.

It runs the bundle's own workflows, as users do. It does not repeat a complete run, and continues one that was killed.
The folder of a run names its arm, labels, steps and seed: after a change of any other setting in ``protocol.py``,
remove the folders that it concerns.

    python -m benchmarks.study --data data

- ``pretrain`` runs ``pretrain.json`` for each arm and seed, for an equal time.
- ``segment`` runs ``train.json`` from each arm's encoder, from scratch, or with a peer as the network, for each task
  and number of labelled subjects, with equal steps (peers: equal time). Then it evaluates the test subjects.
- ``restore`` does the same for denoising and super-resolution, then runs ``benchmarks.restoration`` on the test scans.
- ``robustness`` evaluates again, on test scans with artifacts.
- ``report`` puts the rows of complete runs into the published ones, ``results/study_*.csv``, and makes of all of them
  the tables with intervals, in ``results`` and in the page, and the picture. It needs neither data nor runs. Before a
  study of other data or with other settings, remove the published rows.

``--jobs`` runs share the CPU cores, in the order of the protocol: all of one seed, then the next. ``--full`` runs every
arm with every number of labels, as the protocol wants where there is a GPU.
"""

from benchmarks.common import add_runs, argument_parser
from benchmarks.study.protocol import PEERS, RUNNABLE, SEEDS, STAGES, TASKS
from benchmarks.study.report import report
from benchmarks.study.runs import Study, matrix, run_all


def main() -> None:
    parser = argument_parser(__doc__, data=True)
    add_runs(parser, "study", jobs=2)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--arms", nargs="+", default=list(RUNNABLE), choices=list(RUNNABLE))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--full", action="store_true", help="every arm with every number of labels")
    args = parser.parse_args()
    study = Study(args.data, args.work_dir, args.jobs)
    if args.stages != ["report"]:
        study.manifest  # noqa: B018  (before hours are spent)
    cells, failed = matrix(study, args), []
    for stage in args.stages:
        if stage != "report":
            print(f"{stage}:", flush=True)
            failed += run_all(cells[stage], args.jobs)
    if "report" in args.stages:
        report(study)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
