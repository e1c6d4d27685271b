"""Task models: one file each, sizes in a table at its top."""

from .image_classifier import ImageClassifier, ImageClassifierConfig
from .scene_classifier import SceneClassifier, SceneClassifierConfig

__all__ = [
    "ImageClassifier",
    "ImageClassifierConfig",
    "SceneClassifier",
    "SceneClassifierConfig",
]
