"""The MLflow model: written from files, and proved to load and answer in a clean process."""

from ingot.packaging.bundle import check_manifest, package_model
from ingot.packaging.verify import Verification, verify_package

__all__ = ["Verification", "check_manifest", "package_model", "verify_package"]
