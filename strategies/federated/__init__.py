"""Federated strategies: FFA-LoRA and the references it is measured against."""
