"""A sweep on a Ray cluster of several nodes on this machine: ``python ray_nodes.py FOLDER NODES CHANGE``.

``CHANGE`` is ``none``, ``remove`` (a node is killed in the middle) or ``replace`` (another one is added afterwards).
Prints the names of the shards that were stored when the node was killed, and the seconds that the sweep took.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from nrm_plugin.dataset import sweep
from tests.dataset.sweep_nets import QUERIES, Data, net

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}
"""Settings to detect a lost node within seconds instead of half a minute, without mistaking a slow node for one."""
COUNT = 60


def stored(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("rows/part-*"))


def main() -> None:
    folder, nodes, change = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}  # the driver, without a worker
    cluster = Cluster(initialize_head=True, head_node_args=head)
    workers = [cluster.add_node(**NODE) for _ in range(nodes)]
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    cluster.wait_for_nodes()
    started = time.perf_counter()
    arguments = (net(), Data(COUNT, wait=0.05), QUERIES, folder)
    options = {"batch_size": 2, "shard": 2, "engine": "ray", "progress": False}
    with ThreadPoolExecutor(1) as thread:  # Ray adds nodes in the main thread only
        swept = thread.submit(sweep, *arguments, **options)
        before: list[str] = []
        if change != "none":
            while len(before := stored(folder)) < 5 and not swept.done():
                time.sleep(0.02)
            cluster.remove_node(workers[0], allow_graceful=False)
        if change == "replace":
            cluster.add_node(**NODE)
        swept.result()
    print(json.dumps({"before": before, "seconds": time.perf_counter() - started}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
