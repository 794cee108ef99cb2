"""The Flower ClientApp: local training and the client's own privacy ledger."""
