"""The recommendation task: who liked what when, what may be known at that time, and how predictions are measured."""
