"""What stages will take, by kinds of models: circuits, networks, texts."""
