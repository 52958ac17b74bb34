"""The application that `serve run serve_config.yaml` builds."""

# Annotations must be evaluated here: Serve looks at `build`'s to parse the config's `args`.
from ray import serve
from ray.serve import Application

from deployments.decode import VAEDecoder
from deployments.denoise import Denoise
from deployments.encode import TextEncoder
from deployments.ingress import Ingress
from deployments.settings import Settings


def build(settings: Settings) -> Application:
    """Ingress, TextEncoder, VAEDecoder, and the transformer's: by default Base, Bridge and Distilled.

    Those are one class under several names, so that each can have its own pool, replicas and autoscaling in
    `serve_config.yaml`.
    """
    model = settings.read_model()
    encoder = serve.deployment(TextEncoder).bind(model, settings.encoder)
    transformers = {
        name: serve.deployment(Denoise, name=name).bind(model, transformer)
        for name, transformer in settings.transformers.items()
    }
    decoder = serve.deployment(VAEDecoder).bind(model, settings.decoder)
    return serve.deployment(Ingress).bind(settings, encoder, transformers, decoder)
