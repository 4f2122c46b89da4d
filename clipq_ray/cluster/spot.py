"""EC2 nodes on spot while there is spot capacity, else on demand: the node provider of `cluster.yaml`.

Ray's autoscaler would ask for ever for a kind of node that EC2 refuses: it turns to another kind only when a node was allocated and never came up (2.60,
`CloudResourceMonitor` hears of ALLOCATION_TIMEOUT, a refusal is ALLOCATION_FAILED). So a refused request for spot is made again on demand, at once; the next
node tries spot first again. Imported by `ray up` and on the head, without torch. Not covered: nodes that are taken away (Ray asks for new ones).
"""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

MARKET = "InstanceMarketOptions"
log = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):  # type: ignore[misc]
    """As Ray's own provider for EC2, with all its settings."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        """As `AWSNodeProvider.create_node`, which has tried all zones before it gives up; whatever else is wrong is wrong on demand too, and is raised from there."""
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as error:
            if MARKET not in node_config:
                raise
            log.warning(
                "no %s on spot (%s); asking on demand", node_config.get("InstanceType"), error.category
            )
        on_demand = {name: value for name, value in node_config.items() if name != MARKET}
        return super().create_node(on_demand, tags, count)
