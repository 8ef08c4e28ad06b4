"""What trains inside a job: one module per backend."""
