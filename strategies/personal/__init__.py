"""Personalisation: recommenders that know users by what they did, and adapters mixed for each of them."""
