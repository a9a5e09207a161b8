"""From a trained model to text: the key–value cache, sampling, and search."""
