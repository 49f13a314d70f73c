"""The evaluation of images and models: metrics, by their protocols, as records."""
