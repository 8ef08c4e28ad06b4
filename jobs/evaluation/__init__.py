"""How good a version is: rows, answers, metrics."""
