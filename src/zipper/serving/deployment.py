"""Many replicas of the server by Ray Serve, on one machine or a cluster. Knows nothing of what is
served: each replica is the application of `zipper.serving.app`, streams and all.

It needs the extra `ray`.
"""

from typing import Any

from zipper.environment import extra, need
from zipper.errors import ZipperError
from zipper.pipeline import Pipeline
from zipper.serving import app
from zipper.serving.bodies import Caps

need("ray")


def deployment(
    model: str = "",
    replicas: tuple[int, int] = (1, 4),
    rows: int = 8,
    queue: int = 64,
    key: str = "",
    caps: Caps | None = None,
    name: str = "zipper",
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """An application for `ray.serve.run`. model: a folder that every node has, or a hub id; "" is
    the shipped one. replicas: fewest and most; one more is started when each has more requests
    than `rows`. cpus, gpus: of each; with a GPU the model lies there. The rest is that of
    `zipper.serving.app.serve`.

    Raises a ZipperError for numbers of replicas that are none.
    """
    least, most = replicas
    if not 1 <= least <= most:
        raise ZipperError(f"{least} to {most} replicas were asked for. Give (1, 4), say.")
    serve = extra("ray.serve")

    def built() -> Any:
        """In a replica."""
        pipeline = Pipeline.from_pretrained(model or None)
        if gpus:
            pipeline.model.to("cuda")
        return app.serve(pipeline, rows, queue, key, caps, name)

    return serve.deployment(
        serve.ingress(built)(),
        name="zipper",
        max_ongoing_requests=rows + queue,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "initial_replicas": least,
            "target_ongoing_requests": rows,
        },
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=2,
        health_check_timeout_s=10,
    ).bind()
