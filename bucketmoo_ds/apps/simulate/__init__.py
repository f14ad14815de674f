"""Two objectives on a few numbers, whose Pareto front is known: where each rule and granularity ends."""
