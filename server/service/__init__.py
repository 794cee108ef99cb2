"""The personalisation service: many users' adapters on one base model, for people and programs that call it."""
