"""What a user would run without this engine, each as its documentation says, on the same model."""
