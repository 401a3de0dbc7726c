"""The laboratory: the baseline, corpora, judges, experiments, benchmarks. The library never imports
it."""
