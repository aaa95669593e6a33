"""The small Mixture-of-Experts language model that ships with the project: corpus, training, evaluation."""
