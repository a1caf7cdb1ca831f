"""How much an error in each layer changes what the model predicts."""
