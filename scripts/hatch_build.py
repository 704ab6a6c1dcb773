"""Puts `recipes/` and `data/` into the wheel as `tuner/_bundled/`; an editable install reads them where they are."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Bundle(BuildHookInterface):
    """hatchling runs this before it writes a wheel; `version` is `standard` or `editable`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] |= {name: f"tuner/_bundled/{name}" for name in ("recipes", "data")}
