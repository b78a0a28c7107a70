"""The study of pretraining: protocol, runs, statistics, report."""
