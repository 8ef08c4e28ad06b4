"""What answers: vLLM, adapter swaps, the gateway."""
