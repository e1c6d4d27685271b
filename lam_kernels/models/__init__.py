"""Task models: one file each, sizes in a table at its top."""

from .image_classifier import ImageClassifier, ImageClassifierConfig

__all__ = ["ImageClassifier", "ImageClassifierConfig"]
