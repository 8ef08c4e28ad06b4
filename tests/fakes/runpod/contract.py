"""The requests' shapes, closed as the real ones are: a field that is not known is refused with 422."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError, model_validator

TITLES = {
    400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 409: "Conflict", 422: "Unprocessable Entity", 429: "Too Many Requests",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip
Version = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
Name = Annotated[str, Field(min_length=1)]
Shape = TypeVar("Shape", bound=BaseModel)


class Problem(Exception):
    """Becomes an application/problem+json answer."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None, retry_after: str = "") -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, errors
        self.headers = {"Retry-After": retry_after} if retry_after else {}

    def answer(self) -> web.Response:
        body: dict[str, Any] = {
            "title": TITLES.get(self.status, "Error"), "status": self.status, "detail": self.detail,
        }  # fmt: skip
        if self.errors:
            body["errors"] = self.errors
        return web.json_response(
            body, status=self.status, headers=self.headers, content_type="application/problem+json"
        )


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Gpu(Closed):
    id: str
    count: int = Field(1, ge=1)
    allowedCudaVersions: list[Version] = []
    minCudaVersion: Version | None = None


class Cpu(Closed):
    id: str
    vcpuCount: int = Field(2, ge=1)


class Persistent(Closed):
    size: int = Field(ge=10)
    path: str


class Network(Closed):
    volumeId: str
    path: str


class Mounts(Closed):
    persistent: Persistent | None = None
    network: list[Network] = Field([], max_length=1)


class CreatePod(Closed):
    name: Name
    image: str | None = None
    templateId: Name | None = None
    gpu: Gpu | None = None
    cpu: Cpu | None = None
    cloud: Literal["SECURE", "COMMUNITY"] = "SECURE"
    dataCenterIds: list[str] = []
    disk: int = Field(20, ge=1)
    env: dict[str, str] = {}
    ports: list[str] = []
    args: str = ""
    registry: str | None = None
    mounts: Mounts = Mounts()
    startSsh: bool = False
    startJupyter: bool = False
    globalNetworking: bool = False

    @model_validator(mode="after")
    def _has_an_image(self) -> CreatePod:
        if self.image is None and self.templateId is None:
            raise ValueError("missing property 'image'")
        return self


class PodAction(Closed):
    action: Literal["start", "stop", "restart", "terminate"]


class QueueDelay(Closed):
    type: Literal["QUEUE_DELAY"]
    queueDelay: float = Field(ge=0.5)


class RequestCount(Closed):
    type: Literal["REQUEST_COUNT"]
    requestCount: int = Field(ge=1)


Scaling = Annotated[QueueDelay | RequestCount, Discriminator("type")]


class Pools(Closed):
    pools: list[str] = Field(min_length=1)
    excludedTypes: list[str] = []
    count: int = Field(1, ge=1)
    allowedCudaVersions: list[Version] = []
    minCudaVersion: Version | None = None


class Workers(Closed):
    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)
    idleTimeout: int | None = Field(None, ge=1, le=3600)


class UpdateEndpoint(Closed):
    name: Name | None = None
    image: str | None = None
    templateId: str | None = None
    args: str | None = None
    disk: int | None = Field(None, ge=1)
    env: dict[str, str] | None = None
    ports: list[str] | None = None
    registry: str | None = None
    gpu: Pools | None = None
    cpu: list[Cpu] | None = None
    workers: Workers | None = None
    scaling: Scaling | None = None
    dataCenterIds: list[str] | None = None
    networkVolumes: list[str] | None = None
    flashboot: Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"] | None = None
    timeout: int | None = None


class CreateEndpoint(Closed):
    name: Name
    type: Literal["QUEUE", "LOAD_BALANCER"]
    scaling: Scaling
    image: str | None = None
    templateId: Name | None = None
    args: str = ""
    disk: int = Field(20, ge=1)
    env: dict[str, str] = {}
    ports: list[str] = []
    registry: str | None = None
    gpu: Pools | None = None
    cpu: list[Cpu] | None = None
    workers: Workers = Workers()
    dataCenterIds: list[str] = []
    networkVolumes: list[str] = []
    flashboot: Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"] = "OFF"
    timeout: int = 300000

    @model_validator(mode="after")
    def _fits_together(self) -> CreateEndpoint:
        if self.image is None and self.templateId is None:
            raise ValueError("missing property 'image'")
        if self.type == "LOAD_BALANCER" and self.scaling.type != "REQUEST_COUNT":
            raise ValueError("a LOAD_BALANCER needs scaling of type REQUEST_COUNT")
        return self


def checked(shape: type[Shape], body: Any) -> Shape:
    """Raises Problem 422 with every violation."""
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        violations = [f"$.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise Problem(422, "Request validation failed.", violations) from None
