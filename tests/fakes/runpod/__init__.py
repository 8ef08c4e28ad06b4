"""A stand-in for RunPod on loopback: REST v2, the job API of endpoints, and "pods" that are local processes.

docs/dev-runpod.md says what it does as the real thing, and what not. `started.py` starts it for tests.
"""
