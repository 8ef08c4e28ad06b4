"""Runs that take time: the durable workflow, the trainer, evaluation."""
