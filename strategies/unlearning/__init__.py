"""Unlearning: classes, users and examples that a trained model is asked to forget, and proof that it did."""
