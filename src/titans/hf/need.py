"""Is transformers there, and of a version that this package works with?"""

LOWEST = 5


def require_transformers() -> None:
    """ImportError of one line that names the extra, unless transformers 5 or later is there."""
    try:
        from transformers import __version__
    except ImportError:
        __version__ = "none"
    major = __version__.partition(".")[0]
    if not major.isdigit() or int(major) < LOWEST:
        raise ImportError(
            f"titans.hf needs transformers {LOWEST} or later, found {__version__}: "
            "pip install -e '.[hf]'"
        )
