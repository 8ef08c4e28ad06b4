"""What we know: recipes, datasets, adapters, verdicts, cards, and the outside stores we know them from."""
