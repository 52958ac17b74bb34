"""The application that `serve run serve_config.yaml` builds."""

# Annotations must be evaluated here: Serve looks at `build`'s to parse the config's `args`.
from ray import serve
from ray.serve import Application

from deployments.decode import VAEDecoder
from deployments.denoise import Denoise
from deployments.encode import TextEncoder
from deployments.ingress import Ingress
from deployments.router import Router
from deployments.settings import Settings
from stages.plan import STAGES


def build(settings: Settings) -> Application:
    """Seven deployments: Ingress, Router, TextEncoder, Base, Bridge, Distilled, VAEDecoder.

    Base, bridge and distilled are one class under three names, so that each can have its own pool, replicas and
    autoscaling in `serve_config.yaml`.
    """
    model, backends = settings.read_model(), settings.backends
    encoder = serve.deployment(TextEncoder).bind(model, backends.encoder)
    stages = {
        stage: serve.deployment(Denoise, name=stage.capitalize()).bind(model, getattr(backends, stage))
        for stage in STAGES
    }
    decoder = serve.deployment(VAEDecoder).bind(model, backends.decoder)
    router = serve.deployment(Router).bind(encoder, stages, decoder)
    return serve.deployment(Ingress).bind(settings, router)
