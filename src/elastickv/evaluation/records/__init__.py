"""What a result says of an evaluation."""
