"""Bakehouse: bakes OpenStack images and brings nodes into clusters."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
"""The checkout that holds the elements, manifests and this library."""
