"""Settings: FT_* before ft.yaml before defaults; every wrong value at once; secrets masked."""

from __future__ import annotations

import pytest

from registry.errors import WrongInput
from registry.project import Project
from registry.settings import Settings, load_settings, sources


def test_the_environment_comes_before_the_file_and_the_file_before_defaults(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "ft.yaml").write_text("gateway_port: 9000\nworker_idle_seconds: 5\n")
    monkeypatch.setenv("FT_GATEWAY_PORT", "9100")
    settings = load_settings(project)
    assert (settings.gateway_port, settings.worker_idle_seconds, settings.gateway_host) == (9100, 5, "127.0.0.1")
    found = sources(project)
    assert found["gateway_port"] == (9100, "FT_GATEWAY_PORT")
    assert found["worker_idle_seconds"] == (5, "ft.yaml")
    assert found["gateway_host"] == ("127.0.0.1", "default")
    assert set(found) == set(Settings.model_fields)


def test_paths_in_the_environment_are_no_settings(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_PROJECT", str(project.root))
    monkeypatch.setenv("FT_DEBUG", "1")
    assert load_settings(project).model_dump() == Settings().model_dump()


def test_secrets_are_masked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources(project)["internal_key"] == ("", "default")
    monkeypatch.setenv("FT_INTERNAL_KEY", "very secret")
    assert sources(project)["internal_key"] == ("***", "FT_INTERNAL_KEY")
    for name in ("receiver_token", "github_secret", "mlflow_webhook_secret"):
        monkeypatch.setenv(f"FT_{name.upper()}", "very secret")
        assert sources(project)[name] == ("***", f"FT_{name.upper()}")


def test_a_secret_that_is_wrong_is_not_shown_either(project: Project) -> None:
    (project.root / "ft.yaml").write_text("github_secret: 12345\n")
    with pytest.raises(WrongInput) as caught:
        load_settings(project)
    assert caught.value.what.startswith("github_secret: ")
    assert "12345" not in str(caught.value)


def test_every_wrong_value_is_named_at_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "ft.yaml").write_text("gateway_port: 70000\ngateway_prot: 1\n")
    monkeypatch.setenv("FT_DRAIN_SECONDS", "long")
    with pytest.raises(WrongInput) as caught:
        load_settings(project)
    lines = caught.value.what.splitlines()
    assert any(
        line.startswith("gateway_port: Input should be less than or equal to 65535 (given: 70000)") for line in lines
    )
    assert any(line.startswith("gateway_prot: ") and "not permitted" in line for line in lines)
    assert any(line.startswith("drain_seconds: ") and "(given: 'long')" in line for line in lines)
    assert len(lines) == 3
    assert str(project.root / "ft.yaml") in caught.value.place


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "just words\n", "a: 1\na: \xff\n"])
def test_a_file_that_is_no_settings(project: Project, text: str) -> None:
    (project.root / "ft.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(WrongInput) as caught:
        load_settings(project)
    assert "ft.yaml" in caught.value.place


def test_an_empty_file_sets_nothing(project: Project) -> None:
    (project.root / "ft.yaml").write_text("# nothing yet\n")
    assert load_settings(project).gateway_port == Settings.model_fields["gateway_port"].default
    assert sources(project)["gateway_port"][1] == "default"
