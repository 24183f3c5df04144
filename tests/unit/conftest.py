"""How hypothesis is to work: on a machine under load no example is too slow."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("vmnode", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmnode")
