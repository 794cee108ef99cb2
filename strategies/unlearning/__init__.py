"""Forgetting on request: slots that unlearn, who asks for them, and what it costs everybody else."""
