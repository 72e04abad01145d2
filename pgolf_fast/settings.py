"""One field of a stage's configuration.

Every stage declares a frozen dataclass beside the code that reads it and
imports only this; `recipe.py` gathers those classes and fills them in.
"""

import dataclasses

from pgolf_fast.errors import UserError


def requirer(stage):
    """What a stage's class checks its settings with: require(condition, field, message)."""

    def require(condition, field, message):
        if not condition:
            raise UserError(f"{stage}.{field}: {message}")

    return require


def setting(default, meaning, env=()):
    """A dataclass field that a recipe can set.

    meaning  what the number is, with its unit, and the reason where there is one
    env      the challenge's environment names for it: one, several, or {name: {text: value}} where
             the challenge's values are not ours
    """
    names = (env,) if isinstance(env, str) else env
    translations = names if isinstance(names, dict) else dict.fromkeys(names)
    return dataclasses.field(default=default, metadata={"meaning": meaning, "env": translations})
