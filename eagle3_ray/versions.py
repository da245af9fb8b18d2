"""Which releases a run was made with, for its record."""

from importlib.metadata import version

from eagle3_ray import __version__

PACKAGES = ("torch", "ray", "transformers", "numpy", "pyarrow", "safetensors")


def installed_versions() -> dict[str, str]:
    """Return the release of this program and of the packages its results depend on."""
    return {"eagle3_ray": __version__, **{name: version(name) for name in PACKAGES}}
