"""Builder of the application for `serve run serve_config.yaml`."""

# No postponed annotations: Serve reads those of `build` to parse the config's `args`.
from ray import serve
from ray.serve import Application

from deployments.http.ingress import Ingress
from deployments.messages import Start
from deployments.replica import StageReplica
from deployments.settings import Settings

_HEALTH_CHECK_PERIOD_S = 2.0  # metrics are told as often


def build(settings: Settings) -> Application:
    """Build the ingress and the deployments of `settings.placement`.

    By default these are TextEncoder, Base, Bridge, Distilled and VAEDecoder: one class under several names, so that
    each can have its own pool, replicas and autoscaling in `serve_config.yaml`. Replicas ask for what their pool says,
    unless the config has `ray_actor_options` for them, which Serve takes in place of these.
    """
    model, pools = settings.read_model(), settings.read_pools()
    replicas = {
        name: serve.deployment(
            StageReplica,
            name=name,
            max_constructor_retry_count=1,  # a constructor that raises would raise again
            ray_actor_options=pools[placement.pool].actor_options,
            # Serve replaces a replica that died after one period, and one that stalls after three.
            health_check_period_s=_HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=10.0,
        ).bind(Start(model=model, placement=placement, stall_timeout_s=settings.stall_timeout_s).to_json())
        for name, placement in settings.placement.items()
    }
    return serve.deployment(
        Ingress,
        max_constructor_retry_count=1,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=settings.request_timeout_s,  # one that is replaced answers what it has
    ).bind(settings, replicas)
