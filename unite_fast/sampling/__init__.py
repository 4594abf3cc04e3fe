"""Generation and reconstruction with a trained model."""
