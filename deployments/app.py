"""Builder of the application for `serve run serve_config.yaml`."""

# No postponed annotations: Serve reads those of `build` to parse the config's `args`.
from ray import serve
from ray.serve import Application

from deployments.http.ingress import Ingress
from deployments.replica import StageReplica
from deployments.settings import Settings


def build(settings: Settings) -> Application:
    """Build the ingress and the deployments of `settings.placement`.

    By default these are TextEncoder, Base, Bridge, Distilled and VAEDecoder: one class under several names, so that
    each can have its own pool, replicas and autoscaling in `serve_config.yaml`.
    """
    model = settings.read_model()
    replicas = {
        # A constructor that raises would raise again, so do not retry.
        name: serve.deployment(
            StageReplica,
            name=name,
            max_constructor_retry_count=1,
            # Serve replaces a replica that died after one period, and one that stalls after three.
            health_check_period_s=2.0,
            health_check_timeout_s=10.0,
        ).bind(model, placement, settings.stall_timeout_s)
        for name, placement in settings.placement.items()
    }
    return serve.deployment(Ingress, max_constructor_retry_count=1).bind(settings, replicas)
