"""The ground floor: frame, bank, gate, factor plans, the adapted layer, the flat codec and PEFT files."""
