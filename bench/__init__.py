"""Evidence without a GPU: the PTX executor, the offline compiler, the SASS analyser."""
