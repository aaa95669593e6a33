"""Models: the families of transformers behind one face, loading, and the small model that ships (its training too)."""
