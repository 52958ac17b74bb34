"""The application that `serve run serve_config.yaml` builds."""

# Annotations must be evaluated here: Serve looks at `build`'s to parse the config's `args`.
from ray import serve
from ray.serve import Application

from deployments.http.ingress import Ingress
from deployments.replica import StageReplica
from deployments.settings import Settings


def build(settings: Settings) -> Application:
    """Ingress, and what `settings.placement` names: by default TextEncoder, Base, Bridge, Distilled and VAEDecoder.

    Those are one class under several names, so that each can have its own pool, replicas and autoscaling in
    `serve_config.yaml`.
    """
    model = settings.read_model()
    replicas = {
        # What a constructor raises, it raises again: the start ends with it instead.
        name: serve.deployment(StageReplica, name=name, max_constructor_retry_count=1).bind(model, placement)
        for name, placement in settings.placement.items()
    }
    return serve.deployment(Ingress, max_constructor_retry_count=1).bind(settings, replicas)
