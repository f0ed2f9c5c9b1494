"""What optional dependencies a command needs, said in one sentence."""

from __future__ import annotations

import importlib.util

from profiles.errors import UserError

MODELS = ("torch", "transformers", "safetensors")
STUDY = ("optuna", "sqlalchemy", "psycopg", "grpc")


def require_models(command: str) -> None:
    """UserError unless what reading checkpoints needs is installed."""
    missing = [name for name in MODELS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}, not installed here: pip install 'bitile[models]'")


def require_study(command: str) -> None:
    """UserError unless Optuna and its storages are installed."""
    missing = [name for name in STUDY if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}, not installed here: pip install 'bitile[allocator]'")
