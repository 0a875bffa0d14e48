"""What tests of data preparation share."""

from __future__ import annotations

import pytest

from tests.data_prep.teacher.server import Server


@pytest.fixture
def serve():
    """Starts a chat endpoint that plays a script."""
    servers = []

    def start(*script):
        servers.append(Server(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
