"""The Flower ServerApp: the round driver, checkpoints and run records."""
