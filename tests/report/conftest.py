from pathlib import Path

import pytest

import autodeploy
from autodeploy._compile import trace
from autodeploy.config import LLMArgs
from autodeploy.program import Program
from autodeploy.report.timeline import Timeline


@pytest.fixture(scope="session")
def demo_program() -> Program:
    return trace(LLMArgs(model=str(Path(autodeploy.__file__).parent / "demo_model")), Timeline())
