"""What a running server does under load, beside its rivals."""
