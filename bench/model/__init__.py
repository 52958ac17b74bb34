"""What a model takes and could do without, by its architecture or its weights alone."""
