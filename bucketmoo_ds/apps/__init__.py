"""The `bucketmoo` command and what it runs: training, quickstart, benchmarks, corpora, the monitor and its report, the
planner. Uses what is public like anybody else."""
