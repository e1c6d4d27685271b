"""Data that the task models train on, and how files become tensors."""

from .digits import load_digits
from .image_folder import load_image_folder
from .labelled_images import LabelledImages, split_by_class

__all__ = ["LabelledImages", "load_digits", "load_image_folder", "split_by_class"]
