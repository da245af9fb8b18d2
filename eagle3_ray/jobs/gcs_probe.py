"""One question to a cluster before it is joined: does it take our token, and is it of our versions?

ray.init finds out too, but only says after twenty seconds that it could not connect, or leaves a process that joins
and fails later. The question is the one that Ray itself asks: what the head has stored about itself.
"""

import json
import os
import platform
import socket

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel  # brings the token, and TLS where it is on
from ray._private.utils import check_version_info
from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub
from ray.exceptions import AuthenticationError

from eagle3_ray.errors import ClusterError

ANSWER_TIMEOUT_S = 10
METADATA_KEY, METADATA_NAMESPACE = b"CLUSTER_METADATA", b"cluster"
NO_TOKEN = (
    "Set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN, or the path of its file in "
    "RAY_AUTH_TOKEN_PATH; the head has it in ~/.ray/auth_token unless told otherwise."
)


def check_cluster(address: str) -> None:
    """Ask the head at `host:port` what it is. Other forms of address (`auto`, `ray://`) are left to ray.init.

    Raises:
        OSError: Nobody answers there.
        ClusterError: The token is missing or wrong, or Ray or Python are of other versions than here.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return
    # First as plainly as can be: gRPC would try a dead port again and again.
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    if not address.startswith("ray://"):
        _check_versions(address, _read_metadata(address))


def _read_metadata(address: str) -> dict[str, str]:
    request = InternalKVGetRequest(key=METADATA_KEY, namespace=METADATA_NAMESPACE)
    try:
        with init_grpc_channel(address) as channel:
            reply = InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=ANSWER_TIMEOUT_S)
    except AuthenticationError as error:  # raised here: token mode is on and there is no token to send
        raise ClusterError(
            f"RAY_ADDRESS={address}: RAY_AUTH_MODE is token, but no token is found. {NO_TOKEN}"
        ) from error
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ClusterError(
                f"RAY_ADDRESS={address}: the cluster asks for a token and refuses {_describe_own_token()}. {NO_TOKEN}"
            ) from error
        raise ConnectionError(f"no Ray head answers: {error.details()}") from error
    metadata: dict[str, str] = json.loads(reply.value)
    return metadata


def _describe_own_token() -> str:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode != "token":
        return f"us, who send none (RAY_AUTH_MODE is {mode or 'not set'})"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if name in os.environ:
            return f"the one of {name}"
    return "the one of ~/.ray/auth_token"


def _check_versions(address: str, metadata: dict[str, str]) -> None:
    try:
        check_version_info(metadata, address)  # Ray's own rule: every number counts, Python's last one too
    except RuntimeError as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: the cluster runs Ray {metadata['ray_version']} on Python "
            f"{metadata['python_version']}, this command Ray {ray.__version__} on Python {platform.python_version()}. "
            "Use the image or the environment that the cluster was started from, or `ray job submit`, which runs the "
            "command in the cluster's own."
        ) from error
