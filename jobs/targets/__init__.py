"""Where a job runs: one module per kind of target."""
