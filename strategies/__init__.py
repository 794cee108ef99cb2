"""How updates are combined: federated, personal and unlearning strategies."""
